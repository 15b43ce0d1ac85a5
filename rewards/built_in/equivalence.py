r"""Mathematical equivalence by math-verify (optional extra `math`): `1/2`, `0.5` and `\frac{1}{2}` are equal.

| completion                            | what is compared                                                        |
|---------------------------------------|-------------------------------------------------------------------------|
| `<answer>3/4</answer>`                | the last block                                                          |
| `so 3 + 4. #### 7`                    | what follows the last `####`, if it is an expression                    |
| `... Answer: \dfrac{1}{2}`            | what follows `answer` on the last line, if it is an expression          |
| `#### even`, `The answer is C.`       | the same, if the gold answer is words or a letter                       |
| `(2, 5]`, `x^2 + 1`, `\dfrac{1}{2}`   | all of it: an expression without delimiters                             |
| other text                            | math-verify's choice: after `final answer is`, in `\boxed{}`, the last  |

A unit may follow an expression; `18 m^2` has one, and `18m^2` is a polynomial. Of several `\boxed{}` the last one
counts, or a list of them: `\boxed{1} and \boxed{3}`. The text before the last `</think>` is read only if there is no
answer after it.

Numbers and signs are first written in one way: see `rewards.built_in.notation`. Floats are compared to 6 places after
the point, or to 6 digits if they are small.

A completion can name the right expression without answering with it: `not $42$`, `$42$ is wrong`, `\neq 42`, `\leq 42`,
`41 = 42`, `42_5`. Such a completion scores 0.0.

It also scores 0.0 if it has another date, clock time, base, unit or bound than the gold answer: `4:10` for `12:30`,
`101` for `101_2`, `10 cm` for `10 m`, `at least 5` for `5`. Letters next to a number are variables: `3t` is not 3, nor
is `X^2` `x^2`. The pair `(1, 2)` is not the set `\{1, 2\}`; `1, 2` may be either. `3:10` is the fraction 3/10 if the
gold answer is one. A gold answer `3:10` may be a clock time, so only `3:10` equals it.

math-verify's own time limits use SIGALRM, which works only in a main thread and elsewhere made graders silently score
0. They are off here, since the scorer's workers have a time limit. A text such as `10**10**10` exceeds it, which is a
failure like any other. As a policy will write such texts, `reward.on_error` should be `drop_sample` or `score=0`.

math-verify passes only digits, blanks and the characters `+-*/^().` of a completion to sympy's parser, which evaluates
what it reads. Everything else goes through a grammar of LaTeX.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

from rewards.built_in.notation import in_latex, is_word_of_two, is_words, readable
from rewards.built_in.quantity import bound_around, has_clock, has_date, is_clock, is_date, unit_after
from rewards.protocol import Completions, RewardError, right_at, text_of

try:
    from math_verify import parse, verify
    from sympy import And, Eq, Number
except ImportError as error:
    raise RewardError("reward math_equivalence needs math-verify: pip install 'quartet-rewards[math]'") from error

# Of a text without delimiters math-verify reads a number alone: 2 of 2\sqrt{3}, and 5 of 3, 5. These are numbers,
# perhaps with a unit, and plain arithmetic, which it reads better without.
_NUMBER = r"[-+]?(?:\d{1,3}(?:[, ]\d{3})+|\d+)?(?:\.\d+)?(?<=[\d])(?: ?%)?"
_UNIT = r"(?: (?!pi\b|sqrt\b)[A-Za-z]{2,}|(?!sqrt)[A-Za-z]{4,})(?: [A-Za-z]{2,})*"
_AREA = r"m(?:\^\{?[23]\}?|[²³])"  # 18 m^2; a polynomial has no blank: 18m^2
_UNIT_BEHIND = re.compile(
    r"(?<=[\d}π]) +(?:(?!(?:or|and|is|was)\b)[A-Za-z]{2,}(?:\^\{?[23]\}?)?(?:[ /][A-Za-z]+)*" rf"|{_AREA})\Z"
)
_AREA_BEHIND = re.compile(rf"(?<=\d) +{_AREA}\Z")
_RATE = re.compile(r"(?<=\d) [A-Za-z]+(?:/| per )[A-Za-z]+\Z")
_AND = re.compile(r"(?<=[\d})])(?:,? (?:and|or) |,? \\text\{ ?(?:and|or) ?\})(?=[-\d\\(]|[a-z] ?=)")
_AS_IT_IS = re.compile(rf"{_NUMBER}(?:{_UNIT})?|(?!.*\d\s+\d)[\d.\s+\-*/^()]+")
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")

LONGEST = 300  # characters of an answer that is an expression without delimiters
_ANSWER_LINE = re.compile(
    r".{0,100}?\b(?:answer(?:\s+is)?|correct\s+(?:option|choice)\s+is)\s*:?\s*(\S.*)", re.IGNORECASE
)
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox|textnormal|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\{[a-z]{2}\}")
_FUNCTION = r"(?:sin|cos|tan|sec|csc|cot|log|ln|exp|sqrt|pi)(?![a-z])"
_WORD = re.compile(rf"(?<![\dA-Za-z}}])(?!{_FUNCTION})[A-Za-z]{{2,}}")
_TEXT = re.compile(r"\\text\{\(?[A-Za-z ]+\)?\}|\(?[A-Za-z]\)?")  # an answer that is words, or the letter of a choice
_PLAIN_NUMBER = re.compile(r"[-+]?[\d.,]+ ?(?:%|°[CF]?)?|\(\d+(?:\.\d+)?\)")

# An expression in prose: factors without blanks between them, and operators. A word is no factor, nor is a unit.
_INNER = r"[\d\s.,;+\-*/^=<>≤≥π√∞°_{}]|\\[,;! ]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|\\[A-Za-z]+"
_BRACKETED = rf"[(\[](?:{_INNER}|[(\[](?:{_INNER})*[)\]])+[)\]]"
_GLUED_UNIT = (
    r"(?:k?m[²³]|[kcm]m[²³]?|[km]?g|m?[lL]|ft|in|lbs?|oz|hrs?|min|mph|[ap]m|st|nd|rd|th)(?![A-Za-z])|[A-Za-z]{4,}"
)
_FACTOR = (
    rf"(?:\\(?!cup|cap|text)[A-Za-z]+(?:\{{[^{{}}]*\}})*\s*|{_FUNCTION}(?:_\{{?\w+\}}?)?\s*"
    rf"|\d+(?:,\d{{3}})*(?:\.\d+|:\d+)?|\.\d+|(?<=\d)(?!{_GLUED_UNIT})[A-Za-z]{{1,3}}"
    rf"|(?<![A-Za-z\d'’])[A-Za-z](?:_\{{?\w+\}}?)?(?![A-Za-z])|{_BRACKETED}|\{{[^{{}}]*\}}"
    rf"| ?[π√]|!(?=\s*[-+*/^=.,)])|°[CF]?|[%∞])"
)
_OPERATOR = r"(?:\s*(?:[+/^=<>≤≥×÷·∪∩]|\\(?:cup|cap|times|cdot|div|leq?|geq?)(?![A-Za-z])) *|\*\*|[-*]| [-*x] )"
_IN_PROSE = re.compile(rf"(?:(?<![\w)])[-+])?{_FACTOR}++(?:{_OPERATOR}[-+]?{_FACTOR}++)*+")
_WIDEST = 200  # characters before and after a number, among which its expression is
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_UNFINISHED = re.compile(r"\d\.\d+\.\d|\d\s*[~|]\s*\d|[-+*/^=<>]\Z")
_ENDLESS = re.compile(r"\d{4}\s*!|!!|\^\{?\d{5}|\^[{(]*\w+[)}]*\^")  # what sympy may compute for minutes

# Boxes with nothing else between them are one list, as math-verify reads them: \boxed{1} and \boxed{3}.
_BOX = r"\boxed{"
_LISTED = re.compile(r"(?:[\s,;$&]|\\[,;:! ()\[\]]|\\q?quad|and|or|\\text\{\s*(?:and|or)?\s*\})*")
_BRACE = re.compile(r"(?<!\\)[{}]")
_SYMBOL_AND_EQUALS = re.compile(r"\A\s*[A-Za-z]\s*=")
_NO_VARIABLE = re.compile(r"\\[A-Za-z]+(?:\s*\{[A-Za-z\s()]*\})?|[A-Za-z]{3,}")  # commands, with words, and words

# A bound or a negation before the answer; a number in another base; and words before or after an answer that deny it.
_BOUND_FIRST = re.compile(r"\A\s*(?:\\(?:neg|lnot|not|neq?|leq?|geq?|lt|gt)(?![A-Za-z])|[<>≠≤≥¬])")
_BASE = re.compile(r"\d_\{?(\d+)")
_BY_ZERO = re.compile(r"/\s*\(?0(?:\.0*)?(?![\d.])")
_OPENING = r"[\s$*({\[\\]*(?:boxed\{)?\s*\Z"
_DENIED = re.compile(rf"(?:\bnot|n't|\bnever|≠)(?:\s+equal(?:\s+to)?|\s+be)?{_OPENING}", re.IGNORECASE)
_EITHER = re.compile(r"(?<![\d/.])(-?\d[\d,]*(?:\.\d+)?) or (-?\d[\d,]*(?:\.\d+)?)(?![\d/%\\])")
_DISOWNED = re.compile(r"[\s$*)}\]\\]*(?:is|was)\s+(?:wrong|incorrect|false|not)\b", re.IGNORECASE)

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off


@right_at(1.0)
def math_equivalence(prompts: list | None, completions: Completions, answer: list[str], **_) -> list[float]:
    r"""Gives 1.0 if the answer of the completion equals the gold one, else 0.0.

    `answer` is an expression (LaTeX or plain), or a solution that ends with `#### expression`. A completion without
    a readable expression scores 0.0; an unreadable gold raises ValueError.

    >>> math_equivalence(None, [r"so $\frac{1}{2}$", "so 2"], answer=["0.5", "0.5"])
    [1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [float(_is_equal(_gold_text(gold), readable(text_of(text)))) for text, gold in pairs]


def _is_equal(gold_text: str, text: str) -> bool:
    spoken = text.rpartition("</think>")[2]
    if is_date(gold_text):
        return has_date(spoken, gold_text)
    if is_clock(gold_text):
        return has_clock(spoken, gold_text)
    gold = _gold(gold_text)
    answer = _answer_after_thoughts(text, takes_words=bool(_TEXT.fullmatch(str(gold[-1]))))
    if not answer or _is_another_statement(answer, gold) or _is_denied(str(answer[-1]), text):
        return False
    if _is_another_quantity(str(answer[-1]), text, str(gold[-1]), gold_text):
        return False
    places = _places(gold[0])
    return verify(gold, answer, float_rounding=places, allow_set_relation_comp=True, timeout_seconds=None)


def _gold_text(answer: str | int | float) -> str:
    return readable(str(answer)).rpartition("####")[2].strip()


@functools.lru_cache(maxsize=4096)
def _gold(expression: str) -> list:
    parsed = _parsed(_AND.sub(", ", _AREA_BEHIND.sub("", _RATE.sub("", expression))))
    if not parsed:
        raise ValueError(f"math-verify cannot read the gold answer {expression[-60:]!r}")
    return parsed


def _answer_after_thoughts(text: str, takes_words: bool) -> list:
    spoken = text.rpartition("</think>")[2]
    return _answer(spoken, takes_words) or _answer(text, takes_words)


def _answer(text: str, takes_words: bool) -> list:
    """Return the answer of a completion as math-verify does: what it parsed, and the text of it as the last entry.
    Words after `####` are an answer only if `takes_words`, since a heading is words too."""
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + len("<answer>") :].partition("</answer>")[0]
    for part in map(_without_unit, _named_answers(text)):
        if _is_expression(part) and (takes_words or not is_words(part)):
            return _parsed_answer(part)
    whole = _without_unit(_trimmed(text))
    return _parsed_answer(whole) if _is_expression(whole) else _of_prose(text)


def _of_prose(text: str) -> list:
    """math-verify's choice. Without delimiters it takes a number out of the middle of an expression: 10 of 10π."""
    text = _last_boxes(text)
    answer = parse(text, parsing_timeout=None)
    if any(mark in text for mark in _DELIMITERS):
        return answer
    place = _last_place(str(answer[-1]), text) if answer else None
    start = place.start() if place else len(text)
    runs = list(_IN_PROSE.finditer(text, max(start - _WIDEST, 0), start + _WIDEST))
    if place is None:
        runs = [run for run in runs if any(map(str.isdigit, run[0]))][-1:]
    run = next((run for run in runs if run.end() > start or place is None), None)
    last = _trimmed(run[0].rpartition("=")[2]) if run else ""
    if not last or _PLAIN_NUMBER.fullmatch(last):
        return answer
    return _parsed_answer(last) if _is_expression(last) else []


def _last_boxes(text: str) -> str:
    r"""The text from its last `\boxed{}` on, and from those before it of which it is the end of a list."""
    first, start = 0, text.find(_BOX)
    end = -1
    while start >= 0:
        if end < 0 or not _LISTED.fullmatch(text, end, start):
            first = start
        end = _end_of_braces(text, start + len(_BOX))
        start = text.find(_BOX, end)
    return text[first:] if end >= 0 else text


def _end_of_braces(text: str, start: int) -> int:
    """Return where the braces end that were opened right before `start`; the end of the text if they do not."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    return len(text)


def _last_place(source: str, text: str) -> re.Match[str] | None:
    """Return where `source` is last in the text. math-verify removes the commas of a number."""
    commas = ",?" if source[:1].isdigit() else ""
    pattern = re.compile(commas.join(map(re.escape, source)))
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def _without_unit(expression: str) -> str:
    return _AND.sub(", ", _UNIT_BEHIND.sub("", expression)) if len(expression) <= LONGEST else expression


def _named_answers(text: str) -> Iterator[str]:
    _, mark, marked = text.rpartition("####")
    if mark:
        yield _trimmed(marked)
    if line := _ANSWER_LINE.fullmatch(text.strip().rpartition("\n")[2]):
        yield _trimmed(line[1])


def _trimmed(text: str) -> str:
    return text.strip("* \t\r\n").rstrip(".").strip("* \t\r\n")


def _is_expression(text: str) -> bool:
    """Whether the text is an expression without delimiters: short, on one line, and without words, or only words."""
    if not text or len(text) > LONGEST or "\n" in text or any(mark in text for mark in _DELIMITERS):
        return False
    if _ENDLESS.search(text):
        return False
    return is_words(text) or not _WORD.search(_COMMAND.sub(" ", text))


def _parsed_answer(expression: str) -> list:
    """`1,22` may be a list, or a number with a decimal comma. `1,222` is a number."""
    if _UNFINISHED.search(expression):
        return []
    parsed = _parsed(expression)
    if _DECIMAL_COMMA.fullmatch(expression) and not _AS_IT_IS.fullmatch(expression):
        parsed = parsed + _parsed(expression.replace(",", "."))
    return parsed


def _parsed(expression: str) -> list:
    """An expression with or without delimiters, read whole."""
    delimited = any(mark in expression for mark in _DELIMITERS[1:]) or expression.count("$") > 1
    latex = expression if delimited else in_latex(expression)
    forms = [f"${latex}$", latex]
    if delimited or _AS_IT_IS.fullmatch(latex):
        forms.reverse()
    return next(filter(None, (parse(form, parsing_timeout=None) for form in forms)), [])


def _is_another_statement(answer: list, gold: list) -> bool:
    """Whether the answer is a false equation, a number in another base, a division by zero, or a bound of its own."""
    expression, source, gold_source = answer[0], str(answer[-1]), str(gold[-1])
    if isinstance(expression, Eq | And) and not expression.free_symbols and expression != gold[0]:
        return not all(map(_holds, expression.args if isinstance(expression, And) else [expression]))
    if _BOUND_FIRST.search(source) and not _BOUND_FIRST.search(gold_source):
        return True
    if _has_other_letters(source, gold_source) or {_brackets(source), _brackets(gold_source)} == {"(", "{"}:
        return True
    return _base(source) != _base(gold_source) or bool(_BY_ZERO.search(source))


def _has_other_letters(source: str, gold_source: str) -> bool:
    """Return whether two answers differ only in letters that math-verify treats as equal: x and X, or `no` and `on`. A
    single letter is a choice of an option, in either case."""
    if is_word_of_two(gold_source) and is_words(source):
        return source.lower() != gold_source.lower()
    letters, gold_letters = _variables(source), _variables(gold_source)
    is_choice = len(gold_source.strip("$().{} ")) == 1
    return (
        not is_choice and letters != gold_letters and set(map(str.lower, letters)) == set(map(str.lower, gold_letters))
    )


def _variables(source: str) -> set[str]:
    rest = _NO_VARIABLE.sub(" ", _SYMBOL_AND_EQUALS.sub("", source))
    return set(filter(str.isalpha, rest))


def _brackets(source: str) -> str:
    r"""Return the brackets around all of a list: `{` of a set, `(` of a pair or an interval; nothing without them.

    >>> _brackets(r"\{1, 2\}"), _brackets("(1, 2)"), _brackets("(1, 2), (3, 4)"), _brackets("(1)")
    ('{', '(', '', '')
    """
    plain = re.sub(r"\\(?:left|right|[,;:! ])|\s", "", source).replace(r"\{", "{").replace(r"\}", "}").strip("$")
    depth, has_comma = 0, False
    for place, character in enumerate(plain):
        depth += (character in "({[") - (character in ")}]")
        has_comma |= depth == 1 and character == ","
        if depth <= 0 and place + 1 < len(plain):
            return ""
    if not (has_comma and depth == 0):
        return ""
    return "{" if plain[0] == "{" else "("


def _base(source: str) -> str:
    base = _BASE.search(source)
    return base[1] if base else "10"


def _is_another_quantity(source: str, text: str, gold_source: str, gold_text: str) -> bool:
    """Return whether the answer has another unit than the gold one, or is a bound where the gold one is another."""
    place, gold_place = _last_place(source, text), _last_place(gold_source, gold_text)
    if place is None or gold_place is None:
        return False
    bound = bound_around(text, *place.span())
    if bound and bound != bound_around(gold_text, *gold_place.span()):
        return True
    unit, gold_unit = unit_after(text, place.end()), unit_after(gold_text, gold_place.end())
    return unit is not None and gold_unit is not None and unit != gold_unit


def _holds(equation: Any) -> bool:
    try:
        return math.isclose(float(equation.lhs), float(equation.rhs))
    except (TypeError, OverflowError):  # complex, or beyond a float
        return True


def _is_denied(source: str, text: str) -> bool:
    """Return whether words right before or after the last `source` deny that it is the answer, or name another number
    as well."""
    place = _last_place(source, text)
    if place is None:
        return False
    start, end = place.span()
    first = max(start - 40, 0)
    for one, other in _EITHER.findall(text[first : end + 40]):
        if one != other and source in (one, other):
            return True
    return bool(_DENIED.search(text[first:start]) or _DISOWNED.match(text, end))


def _places(gold: Any) -> int:
    """Digits after the point to compare to: 6, and more for a number below 0.1, of which 6 would leave too little."""
    if not isinstance(gold, Number) or not gold.is_finite or not 0 < abs(gold) < 0.1:
        return 6
    return 5 - math.floor(math.log10(max(float(abs(gold)), 1e-300)))
