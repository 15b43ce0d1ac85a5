"""What a command works out at each start, and nearly every test here starts one: worked out once, or with less care."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import rollout.costs
from grpo.config import options
from grpo.data import word_problems as module
from grpo.run import hardware

TEXTS: dict[str, str] = {}
MAKE, PROBLEMS = options.to_yaml, functools.cache(module.word_problems)
VERSION = functools.cache(hardware._version)


def to_yaml(value: Any, inline: bool = False) -> str:
    if not inline:
        return MAKE(value)
    key = f"{type(value)} {value!r}"
    if key not in TEXTS:
        TEXTS[key] = MAKE(value, inline=True)
    return TEXTS[key]


def word_problems(split: str, levels: Sequence[int], seed: int = 0, *, count: int = 20_000) -> list[dict[str, Any]]:
    return [row.copy() for row in PROBLEMS(split, tuple(levels), seed, count=count)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Texts of defaults, word problems and versions depend on their arguments alone. How well times are measured
    matters to no test of this folder: those of the measurements are in tests/rollout. Workers of xdist call this for
    every test."""
    if not item.path.is_relative_to(Path(__file__).parent):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "to_yaml", to_yaml)
        patch.setattr(module, "word_problems", word_problems)
        patch.setattr(hardware, "_version", VERSION)
        patch.setattr(rollout.costs, "REPEATS", 1)
        return (yield)
