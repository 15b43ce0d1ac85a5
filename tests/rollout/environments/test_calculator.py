"""Arithmetic without eval, and GSM8K's marked solutions as episodes with the calculator."""

import random
import re
import time
from fractions import Fraction

import pytest

from policies.presets import small_tokenizer
from rollout.environments.calculator import LONGEST, Calculator, evaluate
from rollout.environments.format import TurnFormat
from rollout.environments.protocol import answers_of
from rollout.sampling import EnvironmentSpec

ANSWERS = answers_of(EnvironmentSpec(environments=(("", "calculator"),)), "")
SOLUTION = "He has 48/2 = <<48/2=24>>24 left.\nThat is 24+1.5 = $<<24+1.5=25.50>>25.50.\n#### 25.50"


VALUES = {
    "48/2": "24",
    "0.1+0.2": "0.3",
    "1/3": "0.333333",
    "2/3": "0.666667",
    "-1/8": "-0.125",
    "2*(3+4)-5": "9",
    "7//2 + 7 % 2": "4",
    "2**10": "1024",
    "2**-1": "0.5",
    "-2**2": "-4",
    " .5 * 100 ": "50",
    "-1/10**9": "0",
    "12345678901234567890 / 10": "1234567890123456789",
}
REFUSED = {
    "division by zero": ["1/0", "1 % 0", "0 ** -1"],
    "an exponent must be a whole number up to 100": ["9**9**9", "2**0.5"],
    "^a number is too large": ["(10**100)**100", "10**31", "1e999", "-1e999 * 0"],
    f"an expression may have {LONGEST} characters": ["1+" * LONGEST + "1"],
    "is no number": ["__import__('os').system('true')", "(1).__class__", "[1][0]", "'a' * 3", "True + 1", "2j * 2"],
    " is no number": ["~1", "lambda: 1", "(" * 90 + ")" * 90],
    "not an arithmetic expression": ["x := 3", "3 apples", "", "(1+2", "2 + '\ud800'", "\0"],
    "no operation with": ["1 << 3"],
}


def test_arithmetic():
    assert {expression: evaluate(expression) for expression in VALUES} == VALUES


def test_what_is_no_arithmetic_is_refused_at_once():
    for said, expressions in REFUSED.items():
        for expression in expressions:
            started = time.thread_time()
            with pytest.raises(ValueError, match=said):
                evaluate(expression)
            assert time.thread_time() - started < 0.5


def test_results_are_those_of_python():
    """Against Python's own evaluation, over fractions, of 300 random expressions."""
    rng = random.Random(0)
    compared = 0
    for _ in range(300):
        numbers = [str(rng.randint(1, 99)) for _ in range(4)]
        text = numbers[0] + "".join(rng.choice(["+", "-", "*", "/", "//", "%"]) + n for n in numbers[1:])
        exact = re.sub(r"\d+", r"Fraction(\g<0>)", text)
        try:
            value = eval(exact, {"Fraction": Fraction})
        except ZeroDivisionError:
            continue
        assert abs(Fraction(evaluate(text)) - value) <= Fraction(1, 2 * 10**6), text
        compared += 1
    assert compared > 250


def test_a_marked_solution_becomes_an_episode():
    """Which tokens the tool writes: `24>>` and `25.5>>`, where the solution has 25.50. What the policy writes ends each
    turn with the stop token."""
    tokenizer = small_tokenizer([SOLUTION] * 20)
    form = TurnFormat(tokenizer, [Calculator().calculate])
    ids, sampled = form.demonstration(SOLUTION, ANSWERS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == SOLUTION.replace("=25.50>>", "=25.5>>")
    assert tokenizer.decode([i for i, own in zip(ids, sampled, strict=True) if not own]) == "24>>25.5>>"
    turns = tokenizer.decode([i for i, own in zip(ids, sampled, strict=True) if own]).split("<|end|>")
    assert turns == ["He has 48/2 = <<48/2=", "24 left.\nThat is 24+1.5 = $<<24+1.5=", "25.50.\n#### 25.50", ""]


def test_the_tools_answers_are_those_of_a_pure_environment_that_is_built_in():
    form = TurnFormat(small_tokenizer([SOLUTION] * 20), [Calculator().calculate])
    text = "so <<x+1=3>>3, <<2*1.50=3.00>>3"  # the calculator refuses the first
    ids, sampled = form.demonstration(text, ANSWERS)
    assert form._tokenizer.decode([i for i, own in zip(ids, sampled, strict=True) if not own]) == "3>>3>>"
    ids, sampled = form.demonstration(text)
    assert form._tokenizer.decode([i for i, own in zip(ids, sampled, strict=True) if not own]) == "3>>3.00>>"
    for path in ("word_game", "python", f"{__file__}:Pure"):
        assert answers_of(EnvironmentSpec(environments=(("", path),)), "") is None
    assert answers_of(EnvironmentSpec(tools=(f"{__file__}:evaluate_twice",)), "") is None


class Pure(Calculator):
    """A user's class, which is not run in this process."""


def evaluate_twice(expression: str) -> str:
    """Evaluates twice.

    Args:
        expression: numbers
    """
    return evaluate(evaluate(expression))
