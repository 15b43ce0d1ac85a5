"""Completions that a reward is tried on: right, wrong, empty and hostile ones, made from gold solutions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeGuard

from rewards.data.examples import Example

# full: expects full marks. less: full marks are a fault. same: worth a look unless it scores as gold does.
# odd: worth a look if it gets full marks.
Expected = Literal["full", "less", "same", "odd"]


class Kind(NamedTuple):
    expected: Expected
    meaning: str


KINDS: dict[str, Kind] = {
    "gold": Kind("full", "gold solution"),
    "empty": Kind("less", "nothing"),
    "blank": Kind("less", "only spaces"),
    "wrong": Kind("less", "gold, last digit raised"),
    "other": Kind("less", "gold of another row"),
    "cut": Kind("less", "gold, cut before its answer"),
    "unanswered": Kind("less", "the template, no answer"),
    "hostile": Kind("less", "hostile text"),
    "padded": Kind("same", "gold between blank lines"),
    "followed": Kind("same", "gold, closing sentence"),
    "decimal": Kind("same", "gold, 42.0 for 42"),
    "grouped": Kind("same", "gold, 1,000 for 1000"),
    "hedged": Kind("odd", "gold, then a wrong one"),
    "denied": Kind("odd", "it is not the answer"),
    "echo": Kind("odd", "the question"),
}

HOSTILE = [
    "".join(chr(33 + i * i * 7919 % 9000) for i in range(20_000)),
    *(
        unit * (20_000 // len(unit))
        for unit in ("####", "(", r"\boxed{", "<answer>", "9", "1,", "a ", "\n", "\x00\ud800")
    ),
]

_DIGIT = re.compile(r"[0-9]")
_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_WHOLE = re.compile(r"(?<![\w^_/:.,])-?[0-9]+(?:,[0-9]{3})*(?![\w^_/:,]|\.[0-9])")
_MARK = re.compile(r"####|\\boxed\{|<answer>|answer(?: is|:)", re.IGNORECASE)  # the answer follows the last mark
ANSWER = "{answer}"  # in a template
BARE = ANSWER
SHORT = 5  # words of a solution that is an answer as a whole


class Probe(NamedTuple):
    kind: str
    text: str


def probes(examples: Sequence[Example], template: str = BARE) -> list[list[Probe]]:
    """Returns the completions to try on each example, without the kinds that cannot be made of it. Where `template` is
    given, the gold solutions of the data are bare answers, and a completion is the template with the answer in it.

    >>> [probe.text for probe in probes([Example("a", "2 + 3 = ?", "#### 5")])[0][:4]]
    ['#### 5', '', ' \\n\\t \\n', '#### 6']
    """
    rows = []
    for i, example in enumerate(examples):
        solution = example.solution
        number = _whole_number(solution)

        def filled(answer: str) -> str:
            return template.replace(ANSWER, answer)

        gold = filled(solution)
        wrong, other = (answer and filled(answer) for answer in (misprint(solution), _another(examples, i)))
        texts = {
            "gold": gold,
            "empty": "",
            "blank": " \n\t \n",
            "wrong": wrong,
            "other": other,
            "cut": _cut(gold),
            "unanswered": filled("") if template != BARE else None,
            "hostile": HOSTILE[i] if i < len(HOSTILE) else None,
            "padded": f"\n\n{gold}\n\n",
            "followed": f"{gold}\nI hope this helps!",
            "decimal": filled(_with_number(solution, number, f"{number[0]}.0")) if number else None,
            "grouped": filled(_with_number(solution, number, f"{_value(number):,}")) if _is_plain(number) else None,
            "hedged": f"{gold}\n{wrong or other}" if wrong or other else None,
            "denied": f"It is not {number[0]}." if number else None,
            "echo": example.question,
        }
        rows.append([Probe(kind, text) for kind, text in texts.items() if text is not None])
    return rows


def misprint(solution: str) -> str | None:
    """Returns `solution` with the last digit of its answer raised by one, 9 to 0; None where that has none.

    >>> misprint("6 * 7 = 42, so #### 1,234 apples"), misprint("In 1969 they landed. Answer: B")
    ('6 * 7 = 42, so #### 1,235 apples', None)
    """
    first = len(solution) - len(_answer_part(solution))
    digits = [digit for digit in _DIGIT.finditer(solution) if digit.start() >= first]
    if not digits:
        return None
    start, end = digits[-1].span()
    return f"{solution[:start]}{(int(digits[-1][0]) + 1) % 10}{solution[end:]}"


def _whole_number(solution: str) -> re.Match[str] | None:
    """Returns the whole number that is the answer; None if the answer has other numbers or none."""
    first = len(solution) - len(_answer_part(solution))
    numbers = _NUMBER.findall(solution, first)
    return _WHOLE.search(solution, first) if len(numbers) == 1 else None


def _with_number(solution: str, number: re.Match[str], other: str) -> str:
    return solution[: number.start()] + other + solution[number.end() :]


def _value(number: re.Match[str]) -> int:
    return int(number[0].replace(",", ""))


def _is_plain(number: re.Match[str] | None) -> TypeGuard[re.Match[str]]:
    """Whether there is a number with thousands, and no commas between them."""
    return number is not None and abs(_value(number)) >= 1000 and "," not in number[0]


def _cut(completion: str) -> str | None:
    """Returns the first half of what stands before the answer, as if the tokens had run out there; None where nothing
    does, or where the half has the answer already."""
    before = completion[: len(completion) - len(_answer_part(completion))]
    cut, answer = before[: len(before) // 2].rstrip(), _answer(completion)
    if isinstance(answer, str):
        has_answer = answer in cut.lower()
    else:
        has_answer = answer in [float(number.replace(",", "")) for number in _NUMBER.findall(cut)]
    return None if has_answer else cut or None


def is_bare(solution: str) -> bool:
    """Whether the solution is an answer as a whole, without a form around it.

    >>> is_bare("42"), is_bare("#### 42")
    (True, False)
    """
    return len(solution.split()) <= SHORT and not _MARK.search(solution)


def _answer_part(solution: str) -> str:
    """Returns the part of a solution that has its answer: what follows the last mark. A long solution without a mark
    gives its last word."""
    marks = [mark.end() for mark in _MARK.finditer(solution)]
    if marks:
        return solution[marks[-1] :]
    return solution if len(solution.split()) <= SHORT else solution.split()[-1] + solution[len(solution.rstrip()) :]


def _another(examples: Sequence[Example], i: int) -> str | None:
    """Returns the next solution with another answer."""
    answer = _answer(examples[i].solution)
    following = (examples[(i + step) % len(examples)].solution for step in range(1, min(len(examples), 50)))
    return next((solution for solution in following if _answer(solution) != answer), None)


def _answer(solution: str) -> str | float:
    part = _answer_part(solution)
    numbers = _NUMBER.findall(part)
    return float(numbers[-1].replace(",", "")) if numbers else " ".join(part.lower().split())
