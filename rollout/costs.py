"""Measures what drafts cost on this machine: the table from which the depth controller chooses a depth."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch

from rollout.backends import Decoder
from rollout.depth import CostTable
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from rollout.shard import Decoding

PROMPT_TOKENS, REPEATS = 96, 7
MOST_TOKENS = 256  # of one verifying forward; deeper drafts of so many rows never paid off


def measure(decoder: Decoder, rows: int, depth: int) -> CostTable:
    """Times rounds of 0, 1, 2, 3, 4, 8, ... `depth` drafts at 1, 2, 4, ... `rows` live rows; between depths it is
    linear."""
    sizes, depths = _doubling(rows), sorted({0, *_doubling(depth), *range(min(depth, 4))})
    return CostTable(
        sizes, [_rounds(decoder, size, [k for k in depths if size * (k + 1) <= MOST_TOKENS or not k]) for size in sizes]
    )


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself.

    >>> _doubling(6)
    [1, 2, 4, 6]
    """
    return [1 << i for i in range((most - 1).bit_length())] + [most]


def _rounds(decoder: Decoder, rows: int, depths: list[int]) -> list[float]:
    """Median milliseconds of a round at every depth. The depths take turns, so that a slow moment of the machine is one
    for all of them: the choice depends on their ratio."""
    decodings = {depth: _begin(decoder, rows, depth) for depth in depths}
    times: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(REPEATS):
        for depth, decoding in decodings.items():
            started = time.perf_counter()
            decoding.forward()
            if decoder.trunk.device.type == "cuda":
                torch.cuda.synchronize(decoder.trunk.device)
            times[depth].append(1e3 * (time.perf_counter() - started))
    return np.interp(range(depths[-1] + 1), depths, [median(times[depth]) for depth in depths]).tolist()


def _begin(decoder: Decoder, rows: int, depth: int) -> Decoding:
    """A batch after its first round, in which the head reads the prompt. Rows with logits that are not finite go on:
    sampling reports them, with their prompt."""
    completion = (REPEATS + 1) * (depth + 1) + 2
    length = max(1, min(PROMPT_TOKENS, decoder.context - completion))
    vocabulary = len(decoder.trunk.embedding)
    prompt = Prompt("costs", "", [7 * i % vocabulary for i in range(length)])
    decoding = Decoding(decoder, [prompt], SamplingParams(rows, 1.0, completion, draft_tokens=depth), aborts=False)
    decoding.forward()
    return decoding
