r"""Mathematical equivalence by math-verify (optional extra `math`): `1/2`, `0.5` and `\frac{1}{2}` are equal.

Its own time limits use SIGALRM, which works only in a main thread and elsewhere made graders silently score 0. They are
off here, since the scorer's workers have a time limit. A text such as `10**10**10` exceeds it, which is a failure like
any other. As a policy will write such texts, `reward.on_error` should be `drop_sample` or `score=0`.

math-verify passes only digits, blanks and the characters `+-*/^().` of a completion to sympy's parser, which evaluates
what it reads. Everything else goes through a grammar of LaTeX.
"""

from __future__ import annotations

import functools
import logging
import re

from rewards.protocol import Completions, RewardError, right_at, text_of

try:
    from math_verify import parse, verify
except ImportError as error:
    raise RewardError("reward math_equivalence needs math-verify: pip install 'quartet-rewards[math]'") from error

# Of a text without delimiters math-verify reads a number alone: 2 of 2\sqrt{3}, and 5 of 3, 5. These are numbers,
# perhaps with a unit after a blank, and plain arithmetic, which it reads better without.
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=[\d])%?"
_UNIT = r" (?!pi\b|sqrt\b)[A-Za-z]{2,}(?: [A-Za-z]{2,})*"
_AS_IT_IS = re.compile(rf"{_NUMBER}(?:{_UNIT})?|(?!.*\d\s+\d)[\d.\s+\-*/^()]+")
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)")
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off


@right_at(1.0)
def math_equivalence(prompts: list | None, completions: Completions, answer: list[str], **_) -> list[float]:
    r"""Gives 1.0 if the last expression of the completion equals the gold one, else 0.0.

    `answer` is an expression (LaTeX or plain), or a solution that ends with `#### expression`. A completion without
    a readable expression scores 0.0; an unreadable gold raises ValueError.

    >>> math_equivalence(None, [r"so $\frac{1}{2}$", "so 2"], answer=["0.5", "0.5"])
    [1.0, 0.0]
    """
    scores = []
    for text, gold in zip(completions, answer, strict=True):
        is_equal = verify(_gold(gold), parse(text_of(text), parsing_timeout=None), timeout_seconds=None)
        scores.append(float(is_equal))
    return scores


@functools.lru_cache(maxsize=4096)
def _gold(answer: str | int | float) -> list:
    expression = _in_latex(str(answer).rpartition("####")[2].strip())
    forms = [f"${expression}$", expression]
    if _AS_IT_IS.fullmatch(expression) or any(mark in expression for mark in _DELIMITERS):
        forms.reverse()
    parsed = next(filter(None, (parse(form, parsing_timeout=None) for form in forms)), None)
    if not parsed:
        raise ValueError(f"math-verify cannot read the gold answer {expression[-60:]!r}")
    return parsed


def _in_latex(expression: str) -> str:
    """A gold without delimiters, with its currency left out and its words in LaTeX."""
    if any(mark in expression for mark in _DELIMITERS[1:]) or expression.count("$") > 1:
        return expression
    expression = expression.replace("$", "")
    if mixed := _MIXED.fullmatch(expression):
        sign, whole, above, below = mixed.groups()
        return rf"{sign}({whole}+\frac{{{above}}}{{{below}}})"
    expression = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", expression)
    return re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", expression)
