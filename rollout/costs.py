"""Measuring what drafts cost here: the table that the depth controller goes by."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollout.depth import CostTable
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from rollout.shard import Decoding, Rows

if TYPE_CHECKING:
    from rollout.engine import Engine

PROMPT_TOKENS, REPEATS = 96, 7
MOST_TOKENS = 256  # of one verifying forward; deeper drafts of so many rows never paid


class _Timed(Decoding):
    """Rows go on where logits are not finite: what that means for a prompt is told when the prompt is sampled."""

    def _abort(self, live: Rows, broken_R: Tensor) -> Tensor:
        return torch.zeros_like(broken_R)


def measure(engine: Engine, rows: int, depth: int) -> CostTable:
    """Times rounds of 0, 1, 2, 3, 4, 8, ... `depth` drafts at 1, 2, 4, ... `rows` live rows; between depths it is
    linear."""
    sizes, depths = _doubling(rows), sorted({0, *_doubling(depth), *range(min(depth, 4))})
    return CostTable(
        sizes, [_rounds(engine, size, [k for k in depths if size * (k + 1) <= MOST_TOKENS or not k]) for size in sizes]
    )


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself.

    >>> _doubling(6)
    [1, 2, 4, 6]
    """
    return [1 << i for i in range((most - 1).bit_length())] + [most]


def _rounds(engine: Engine, rows: int, depths: list[int]) -> list[float]:
    """Median milliseconds of a round at every depth. Depths take turns: a slow moment of the machine hits all of them,
    and it is their ratio that decides."""
    decodings = {depth: _begin(engine, rows, depth) for depth in depths}
    times: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(REPEATS):
        for depth, decoding in decodings.items():
            started = time.perf_counter()
            decoding.forward()
            _wait_for(engine.trunk.device)
            times[depth].append(1e3 * (time.perf_counter() - started))
    measured = {depth: median(values) for depth, values in times.items()}
    costs = [measured[0]]
    for shallow, deep in pairwise(depths):
        step = (measured[deep] - measured[shallow]) / (deep - shallow)
        costs += [measured[shallow] + step * (i + 1) for i in range(deep - shallow)]
    return costs


def _begin(engine: Engine, rows: int, depth: int) -> Decoding:
    """A batch behind its first round, in which the head reads the prompt."""
    completion = (REPEATS + 1) * (depth + 1) + 2
    length = max(1, min(PROMPT_TOKENS, engine.policy.max_length - completion))
    vocabulary = len(engine.trunk.embedding)
    prompt = Prompt("costs", "", [7 * i % vocabulary for i in range(length)])
    decoding = _Timed(engine, [prompt], SamplingParams(rows, 1.0, completion, draft_tokens=depth))
    decoding.forward()
    return decoding


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
