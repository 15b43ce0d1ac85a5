"""Prints docs/grpo-in-200-lines.md, which `make reference` writes: the code of one step of GRPO, as it is."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo.algorithm.advantages import group_relative
from grpo.algorithm.losses import aggregate
from grpo.algorithm.surrogates import clipped_surrogate
from grpo.learner.learner import Learner
from grpo.learner.terms.policy import PolicyTerm
from grpo.session import Session
from grpo.train import train

ROOT = Path(__file__).resolve().parents[1]
MOST = 200
INTRODUCTION = """\
# GRPO in {lines} lines of this repository

One step of GRPO as it runs here, quoted from the source by `make reference`, so that it stays true.
"""
PARTS: list[tuple[str, str, Callable[..., Any]]] = [
    (
        "The loop",
        "A step draws, prepares, learns and publishes. Every line is a primitive that a loop of yours has, too.",
        train,
    ),
    ("What a step learns from", "Prompts become groups of completions, and these get scores.", Session.draw),
    ("The advantage", "A completion is compared with the others of its group.", group_relative),
    ("The gradient", "Each micro-batch is read once, and the terms of the loss add up.", Learner._backward),
    ("The policy's term", "What was sampled becomes likelier where its advantage is positive.", PolicyTerm.scalar),
    ("The clip", "No further than this.", clipped_surrogate),
    (
        "The sum over tokens",
        "Denominators are those of the whole step, so that micro-batches change nothing.",
        aggregate,
    ),
    ("The update", "Then the weights move, once.", Learner.optim_step),
]


def code_of(function: Callable[..., Any]) -> str:
    """The source of a function without the indentation of its class."""
    lines = inspect.getsource(inspect.unwrap(function)).rstrip().split("\n")
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] for line in lines)


def page() -> str:
    sections, count = [], 0
    for title, words, function in PARTS:
        code = code_of(function)
        count += len(code.split("\n"))
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").resolve().relative_to(ROOT)
        sections.append(
            f"## {title}\n\n{words} `{file}`\n\n<!-- not run: quoted from the source -->\n```python\n{code}\n```\n"
        )
    assert count <= MOST, f"the page quotes {count} lines, and {MOST} are promised"
    return "\n".join([INTRODUCTION.format(lines=count), *sections])


if __name__ == "__main__":
    print(page(), end="")
