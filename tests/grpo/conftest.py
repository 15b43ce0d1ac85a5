"""What a command works out at each start, and nearly every test here starts one: worked out once, or with less care."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from copies import OF_REWARDS

import rollout.decoding.costs
from grpo.run import hardware
from rewards.config import options, yaml_file
from rewards.data import word_problems as module
from rewards.isolation import pool
from rollout.weight_sync import sync_check

TEXTS: dict[str, str] = {}
MAKE, PROBLEMS = options.to_yaml, functools.cache(module.word_problems)
VERSION = functools.cache(hardware._version)
LOADER, LONG_TEXT = yaml_file._Loader, 1000


class Quick(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads what the loader of configurations reads, in a tenth of the time, and has other words for a refusal."""

    yaml_constructors, yaml_implicit_resolvers = LOADER.yaml_constructors, LOADER.yaml_implicit_resolvers


def loader(text: str) -> Any:
    return Quick(text) if len(text) > LONG_TEXT else LOADER(text)  # a run has written it


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
    """Texts of defaults, word problems and versions depend on their arguments alone. How well times are measured, how
    many tokens canaries have and how processes of rewards begin matters to no test of this folder: their own are in
    tests/rollout and tests/rewards. Workers of xdist call this for every test."""
    if not item.path.is_relative_to(Path(__file__).parent):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "to_yaml", to_yaml)
        patch.setattr(module, "word_problems", word_problems)
        patch.setattr(hardware, "_version", VERSION)
        patch.setattr(rollout.decoding.costs, "REPEATS", 1)
        patch.setattr(rollout.decoding.costs, "_sizes", lambda most: sorted({1, most}))
        patch.setattr(yaml_file, "_Loader", loader)
        patch.setattr(pool, "subprocess", OF_REWARDS)
        if item.path.stem != "test_publisher":
            patch.setattr(sync_check, "TOKENS", 4)
        return (yield)
