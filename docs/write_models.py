"""Prints docs/models.md, which `make models` writes: how a tiny model of every causal type of transformers is read.

The models are those of tests/zoo. The slow tests compare the page with what they find.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import __version__ as version

from grpo.config.policy import ModelOptions
from grpo.source import agreement
from grpo.source.policy_source import load_policy
from policies.policy import PolicyError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

PAGE = """\
# Which models

transformers {version} has {known} types of causal language models. {exact} of them train here: sampler and learner
compute the log-probabilities of the model's own forward, for every sequence. `make models` writes this page from the
folder of a tiny model of each type with wide random weights in float32 (differences of at most 2e-4).
[`quartet check`](guides/check.md) does the same, and more, with the configuration of your model.

"Our cache" and "once" are the fastest. [Any model](guides/any-model.md) explains them.

| sampled with | prompts are read | types |
|---|---|---|
{rows}

These types are refused by name:

| types | why |
|---|---|
{refused}
"""
SAMPLERS = {"own": "our cache", "joined": "transformers' cache", "apart": "transformers' cache, by length"}
SAMPLERS |= {"whole": "no cache"}
READ = {"packed": "once", "alone": "with each completion"}
LARGEST = 2e-4  # of the differences of a log-probability


class Noted:
    """A function that gives the log-probabilities by a path and by the model's own forward. `last` is how far apart
    they were in the last call, which a load makes with the path that it chooses."""

    def __init__(self, scores: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.scores = scores
        self.last: float | None = None

    def __call__(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        by_path, own = self.scores(*given, **named)
        self.last = (by_path - own).abs().max().item()
        return by_path, own


def way_of(kind: str) -> tuple[bool, str]:
    """Whether a type trains, and how it is sampled and read, or else why not. Its model is loaded from a folder, and
    how far it is off is noted where the load checks it."""
    noted = {name: Noted(getattr(agreement, name)) for name in ("by_sampler", "by_learner")}
    with tempfile.TemporaryDirectory() as where, patch.multiple(agreement, **noted):
        try:
            folder = zoo.folder(where, kind)
            policy = load_policy(ModelOptions(model=str(folder), device="cpu", threads=torch.get_num_threads()))
        except PolicyError as error:
            return False, reason_of(str(error))
    for scores in noted.values():
        if scores.last is None:  # our own form, which a load does not check
            scores(policy)
    largest = max(scores.last for scores in noted.values())
    assert largest < LARGEST, f"{kind}: log-probabilities differ by {largest}"
    return True, f"{SAMPLERS[policy.paths.sampler]} | {READ[policy.paths.rows]}"


def reason_of(error: str) -> str:
    """The first line of a refusal, without the folder, the way out that every refusal has and measured numbers."""
    error = re.sub(r"^model='[^']*' is of type '\w+': ", "", error)
    error = re.sub(r"^model='[^']*'", "its folder", error)
    reason = error.split("cannot be trained here: ")[-1].split(". Llama, Qwen")[0].splitlines()[0].replace("|", "\\|")
    part, fails, _ = reason.partition(" fails in every way")
    return f"{part} differs from the model's own forward in every way that was tried" if fails else reason


def grouped(kinds: dict[str, str]) -> dict[str, str]:
    """The types by what is common to them, those with the most types first."""
    groups: dict[str, list[str]] = {}
    for kind, common in kinds.items():
        groups.setdefault(common, []).append(f"`{kind}`")
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    return {common: ", ".join(names) for common, names in largest_first}


def page() -> str:
    trained: dict[str, str] = {}
    refused: dict[str, str] = {}
    for kind in zoo.kinds():
        trains, words = way_of(kind)
        (trained if trains else refused)[kind] = words
    return written(trained, refused | zoo.refused())


def written(trained: dict[str, str], refused: dict[str, str]) -> str:
    return PAGE.format(
        version=version,
        known=len(trained) + len(refused),
        exact=len(trained),
        rows="\n".join(f"| {way} | {names} |" for way, names in grouped(trained).items()),
        refused="\n".join(f"| {names} | {why} |" for why, names in grouped(refused).items()),
    )


if __name__ == "__main__":
    print(page(), end="")
