"""164 small programming tasks, made here: a text, a gold solution, a mutant of it, and tests that tell them apart."""

from typing import NamedTuple

NUMBERS, LISTS, TEXTS = (
    [-7, 0, 1, 4, 12, 33],
    [[], [3], [5, -1, 9, 2, 7, 4, 12, 6, 3, 8]],
    ["", "b", "sandbox of quartets"],
)

# What the function gives, and what its mutant gives, of `x` (numbers, lists or texts) and a constant k.
FAMILIES = [
    (NUMBERS, "x + {k}", "x - {k}"),
    (NUMBERS, "x * {k}", "x + {k}"),
    (NUMBERS, "x // {k}", "x % {k}"),
    (NUMBERS, "x % {k}", "x // {k}"),
    (NUMBERS, "x ** 2 + {k}", "x ** 2 - {k}"),
    (NUMBERS, "abs(x - {k})", "x - {k}"),
    (NUMBERS, "max(x, {k})", "min(x, {k})"),
    (NUMBERS, "min(x, {k})", "max(x, {k})"),
    (NUMBERS, "{k} - x", "x - {k}"),
    (NUMBERS, "(x + {k}) * 2", "x + {k} * 2"),
    (NUMBERS, "x % {k} == 0", "x % {k} == 1"),
    (NUMBERS, "sum(range(x, x + {k}))", "sum(range(x, x + {k} + 1))"),
    (LISTS, "sum(x) * {k}", "sum(x) + {k}"),
    (LISTS, "[n * {k} for n in x]", "x * {k}"),
    (LISTS, "x[:{k}]", "x[{k}:]"),
    (LISTS, "sorted(x)[:{k}]", "sorted(x)[-{k}:]"),
    (LISTS, "[n for n in x if n > {k}]", "[n for n in x if n < {k}]"),
    (LISTS, "x[::{k}]", "x[{k}::]"),
    (TEXTS, "x * {k}", "x * ({k} + 1)"),
    (TEXTS, "x[{k}:] + x[:{k}]", "x[:{k}] + x[{k}:]"),
    (TEXTS, "x.rjust({k} + 20, '.')", "x.ljust({k} + 20, '.')"),
]
CONSTANTS = [2, 3, 4, 5, 6, 7, 8, 9]


class SmallTask(NamedTuple):
    name: str
    question: str
    gold: str
    mutant: str
    tests: list[str]


def _value(expression: str, x: object) -> object:
    return eval(expression, {}, {"x": x} | {"n": 0})  # of this file alone


def small_tasks() -> list[SmallTask]:
    tasks = []
    for number, (inputs, right, wrong) in enumerate(FAMILIES):
        for k in CONSTANTS:
            name, gold, mutant = f"task_{number}_{k}", right.format(k=k), wrong.format(k=k)
            tests = [f"assert {name}({x!r}) == {_value(gold, x)!r}" for x in inputs]
            question = f"Write a Python function {name}(x) that gives {gold}."
            body = f"def {name}(x):\n    return "
            tasks.append(SmallTask(name, question, f"{body}{gold}\n", f"{body}{mutant}\n", tests))
    return tasks[:164]
