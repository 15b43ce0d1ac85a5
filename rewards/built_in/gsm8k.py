r"""GSM8K correctness: the final number of a completion is compared with the gold number, exactly.

| completion ends with          | strict | flexible | why                                                      |
|-------------------------------|--------|----------|----------------------------------------------------------|
| `#### 42`                     | 42     | 42       |                                                          |
| `#### 42 apples, as I said`   | 42     | 42       | text may follow the number                               |
| `#### 1,234`                  | 1234   | 1234     | commas between thousands do not count                    |
| `#### $42`, `#### $-42`       | 42, -42 | 42, -42 | nor do currency signs                                    |
| `#### 42.0`, `#### 42.`       | 42     | 42       | equal numbers are equal; a full stop is no decimal       |
| `#### 5%`                     | 5      | 5        | GSM8K asks for percents as plain numbers                 |
| `#### −5` (U+2212), `#### –5` | -5     | -5       | typographic minus signs are minus signs                  |
| `#### ４２`, `#### １，２３４` | 42, 1234 | 42, 1234 | full-width characters (East Asian text) are as others  |
| `#### 7 ... #### 42`          | 42     | 42       | the last one is the answer: one guess counts, never two  |
| `#### 42 ... #### Notes`      | 42     | 42       | a `####` without a digit is a heading                    |
| `#### 42 ... #### x = 43`     | none   | 43       | one with a digit is a second guess that cannot be read   |
| `#### 1,23`, `#### 1.2.3`     | none   | the number before | not a number                                    |
| `#### 84/2`, `#### 6*7=42`    | none   | 2, 42    | an expression is not yet an answer                       |
| `#### 5**2`, `#### 5!`        | none   | 2, 5     | nor are a power and a factorial                          |
| `#### 1{,}234`, `#### 1\,234` | 1234   | 1234     | LaTeX writes thousands so                                |
| `#### 1 234`, `#### 1'234`    | none   | 234      | never 1, which is not the number written                 |
| `#### 5 million`, `#### 5k`   | none   | 5        | nor 5                                                    |
| `#### 42 or 43`, `#### 42 to 43` | none | 43   | two guesses are none                                     |
| `#### 7½`, `#### 7²`          | none   | 7        | nor 7                                                    |
| `#### The answer is 42`       | none   | 42       | strict: the number follows the marker, on its line       |
| `\boxed{42}`                  | none   | 42       | mode `boxed` gives 42                                    |
| no number                     | none   | none     |                                                          |

`none` scores 0.0, since the completion gave no answer. A malformed *gold* answer is a fault of the data and raises.

`strict` is the default, since training should reward the format that is graded: under `flexible` any last number
scores, and the policy drifts away from `####`. All functions here take time linear in the length of the text.
"""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from typing import Literal, get_args

from rewards.protocol import Completions, right_at, text_of

Mode = Literal["strict", "flexible", "boxed"]

_PLAIN = str.maketrans(
    "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d０１２３４５６７８９，．＋％＄", "-------0123456789,.+%$"
)
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!; ])(?=[0-9])")
# A sign counts only where a number can start: `10-5` ends with 5, not with -5.
_NUMBER = (
    r"(?P<sign>(?<![\w)])[-+])?(?:\\?[$€£](?P<inner_sign>[-+])?)?"
    r"(?P<digits>(?:[0-9]|\.(?=[0-9]))[0-9.,]*+)"
)
NUMBER = re.compile(_NUMBER)
_BLANKS = r"[^\S\r\n]*+"
MARKED = re.compile(rf"####{_BLANKS}\*{{0,2}}" + _NUMBER)
_LAST_MARK = re.compile(r"####(?!#)(?:(?!####)[^\r\n])*[0-9](?:(?!####)[^\r\n])*")  # with a digit on its line
_LM_EVAL = re.compile(r"#### (-?[0-9.,]+)")
_WELL_FORMED = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++")
_WORD_NEXT = r"(?:\\?[^\S\r\n]|~)*+(?:\\(?:text|mathrm)\{[^\S\r\n~]*+)?"  # also in LaTeX: \text{ million}
_CONTINUED = re.compile(
    rf"{_BLANKS}(?:[-—+*/⁄∕^=×xX÷·⋅:'’_]?{_BLANKS}\{{?\\?[$€£]?\d|[²³¹¼-¾⁰-₉⅐-⅞])"
    rf"|{_BLANKS}\^{_BLANKS}\{{?[-+]\d"
    r"|!(?!\w)|\*\*\d|[kKMB](?!\w)"
    rf"|{_WORD_NEXT}(?:hundred|thousand|million|billion|trillion)s?(?![a-z])"
    rf"|{_WORD_NEXT}(?:or|and|to)(?![a-z])[\s}}]*+\\?[$€£]?\d"
    rf"|[^\S\r\n]++\*\*{_BLANKS}\d"
    rf"|{_BLANKS}\\(?:times|cdot|div|[dt]?frac|sqrt|pi)(?![a-zA-Z])|[eE][-+]?\d"
)


def extract_answer(text: str, mode: Mode = "strict") -> Decimal | None:
    r"""The final number of `text`, or None. Modes as in the table above. Raises ValueError for another mode.

    >>> extract_answer("6 * 7 = 42\n#### 42.0"), extract_answer("so 42 it is", "flexible"), extract_answer("so 42")
    (Decimal('42.0'), Decimal('42'), None)
    """
    text = _LATEX_COMMA.sub(",", text.translate(_PLAIN))
    if mode == "strict":
        mark = _last(_LAST_MARK, text)
        return _single(text, MARKED.match(text, mark.start()) if mark else None)
    if mode == "flexible":
        values = map(_value, reversed(list(NUMBER.finditer(text))))
        return next((value for value in values if value is not None), None)
    if mode == "boxed":
        content = last_boxed(text)
        return _single(content, NUMBER.match(content))
    raise ValueError(f"mode={mode!r} is not a way to read an answer; choose from {', '.join(get_args(Mode))}")


def gold_answer(answer: str | int | float) -> Decimal:
    """The number of a gold solution (`"... #### 42"`) or a bare gold number. Raises ValueError without one."""
    return _gold_answer(str(answer))


@functools.lru_cache(maxsize=4096)
def _gold_answer(text: str) -> Decimal:
    text = _LATEX_COMMA.sub(",", text.strip().translate(_PLAIN))
    if "####" in text:
        gold = extract_answer(text, "strict")
    else:
        bare = NUMBER.fullmatch(text.removesuffix("%").removesuffix("\\"))
        gold = _value(bare) if bare else None
    if gold is None:
        raise ValueError(
            f"the gold answer {text[-60:]!r} has no number: expected a solution that ends with '#### 42', or '42'"
        )
    return gold


@right_at(1.0)
def gsm8k(prompts: list | None, completions: Completions, answer: list[str], mode: Mode = "strict", **_) -> list[float]:
    """Gives 1.0 if the completion's final number is the gold one, else 0.0. Raises ValueError for a bad gold answer.

    TRL passes every column of the data to a reward, so a list for `mode` is a column of that name and is ignored.

    >>> gsm8k(None, ["#### 1,234", "#### 12"], answer=["#### 1234", "#### 1234"])
    [1.0, 0.0]
    """
    if isinstance(mode, list) and len(mode) == len(completions):
        mode = "strict"
    pairs = zip(completions, answer, strict=True)
    return [float(gold_answer(gold) == extract_answer(text_of(text), mode)) for text, gold in pairs]


@right_at(1.0)
def gsm8k_flexible(prompts: list | None, completions: Completions, answer: list[str], **_) -> list[float]:
    """Scores as `gsm8k`, by the last number anywhere in the completion."""
    return gsm8k(prompts, completions, answer, mode="flexible")


@right_at(1.0)
def gsm8k_boxed(prompts: list | None, completions: Completions, answer: list[str], **_) -> list[float]:
    r"""Scores as `gsm8k`, by the number in the last `\boxed{}`."""
    return gsm8k(prompts, completions, answer, mode="boxed")


@right_at(1.0)
def gsm8k_lm_eval(prompts: list | None, completions: Completions, answer: list[str], **_) -> list[float]:
    """Gives 1.0 if lm-evaluation-harness' `exact_match,strict-match` of GSM8K (task version 3.0) is 1, else 0.0.

    Use it to compare with published figures, and `gsm8k` to train, since here a policy may guess first and go on.
    It compares texts without commas and one last full stop. The differences are

    | completion                       | `gsm8k`        | here  | why                                                  |
    |----------------------------------|----------------|-------|------------------------------------------------------|
    | `#### 7 ... #### 42`             | 42             | 7     | the first `####` with a number counts, not the last  |
    | `####42`, `####  42`, `#### **42`| 42             | none  | one space, then the number                           |
    | `#### $42`, `#### -$42`, `#### +42` | 42, -42, 42 | none  | no sign but `-`, no currency                         |
    | `#### −5` (U+2212), `#### ４２`  | -5, 42         | none  | ASCII only                                           |
    | `#### 42.0`, `#### 042`          | equal to 42    | wrong | texts are compared, not numbers                      |
    | `#### 84/2`, `#### 1 234`        | none           | 84, 1 | what follows is ignored                              |
    | `#### 1,23`, `#### 1.2.3`        | none           | 123, 1.2.3 | commas count nowhere                            |

    Raises ValueError for a gold answer without a number, as `gsm8k` does.

    >>> gsm8k_lm_eval(None, ["#### 1,234.", "#### 7\\n#### 1234", "#### $1234"], answer=["#### 1,234"] * 3)
    [1.0, 0.0, 0.0]
    """
    rewards = []
    for text, gold in zip(completions, answer, strict=True):
        gold_answer(gold)
        rewards.append(float(lm_eval_answer(text_of(text)) == _lm_eval_form(str(gold))))
    return rewards


def lm_eval_answer(text: str) -> str | None:
    """The answer of a completion as lm-evaluation-harness reads it, in the form that it compares."""
    match = _LM_EVAL.search(text)
    return _lm_eval_form(match[1]) if match else None


def _lm_eval_form(text: str) -> str:
    """The text without its `regexes_to_ignore`, in their order: `,`, `\\$`, `(?s).*#### ` and `\\.$`."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return functools.reduce(lambda _, match: match, pattern.finditer(text), None)


def _single(text: str, match: re.Match[str] | None) -> Decimal | None:
    """The number of `match`, or None if the text after it makes it the start of an expression."""
    if match is None or _CONTINUED.match(text, match.start("digits") + len(_digits(match))):
        return None
    return _value(match)


def _digits(match: re.Match[str]) -> str:
    return match["digits"].rstrip(".,")  # a full stop or comma after a number is not part of it


def _value(match: re.Match[str]) -> Decimal | None:
    digits = _digits(match)
    if not _WELL_FORMED.fullmatch(digits):
        return None
    sign = "-" if "-" in (match["sign"], match["inner_sign"]) else ""
    return Decimal(sign + digits.replace(",", ""))  # -Decimal(...) would round to 28 digits


def last_boxed(text: str) -> str:
    r"""What is in the last `\boxed{}`, without spacing commands; "" if there is none, or if it does not end."""
    start = text.rfind(r"\boxed{") + len(r"\boxed{")
    if start < len(r"\boxed{"):
        return ""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()].replace(r"\!", "").replace(r"\,", "").strip()
    return ""
