"""Measures what drafts cost on this machine: the table from which the depth controller chooses a depth."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from rollout.backends import Decoder
from rollout.compiled.rounds import FEW_ROWS
from rollout.depth import GRAPH_DEPTHS, MAX_DEPTH, CostTable
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from rollout.shard import Decoding

PROMPT_TOKENS, REPEATS = 96, 7
READ_ROWS = 4
MOST_TOKENS = 256  # of one verifying forward; deeper drafts of so many rows never paid off


def measure(decoder: Decoder, rows: int, depth: int, lookups: bool = False, graphs: int = 0) -> CostTable:
    """Times rounds of 0, 1, 2, 3, 4, 8, ... `depth` drafts at 1, 2, 4, ... `rows` live rows; between depths it is
    linear. With `lookups` also rounds in which the drafts cost nothing; without a head these alone. `graphs`: where
    sequences of so many tokens will be decoded by graphs, also compiled rounds, which may have to be compiled."""
    sizes, depths = _doubling(rows), sorted({0, *_doubling(depth), *range(min(depth, 4))})

    def table(of: list[int], looked_up: bool) -> list[list[float]]:
        depths_at = ([k for k in of if size * (k + 1) <= MOST_TOKENS or not k] for size in sizes)
        return [_rounds(decoder, size, depths, looked_up) for size, depths in zip(sizes, depths_at, strict=True)]

    by_head = table(depths if decoder.head is not None else [0], looked_up=False)
    found = CostTable(sizes, by_head, table(depths, looked_up=True) if lookups else None, reading=_reading(decoder))
    if not graphs or decoder.head is None:
        return found
    few = [size for size in sizes if size <= FEW_ROWS]
    return replace(found, graphs=[_rounds(decoder, size, list(GRAPH_DEPTHS), False, graphs) for size in few])


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself.

    >>> _doubling(6)
    [1, 2, 4, 6]
    """
    return [1 << i for i in range((most - 1).bit_length())] + [most]


def _rounds(decoder: Decoder, rows: int, depths: list[int], looked_up: bool, graphs: int = 0) -> list[float]:
    """Median milliseconds of a round at every depth. The choice depends on the ratio of depths, so they take turns: a
    slow moment of the machine is then one for all. A compiled round is timed after another one of its own kind, as in a
    run. After another kind the processor's caches are cold, and it takes up to twice as long."""
    decodings = {depth: _begin(decoder, rows, depth, looked_up, graphs) for depth in depths}
    times: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(REPEATS):
        for depth, decoding in decodings.items():
            if graphs:
                decoding.forward(0)
            started = time.perf_counter()
            decoding.forward(depth if looked_up else 0)
            if decoder.trunk.device.type == "cuda":
                torch.cuda.synchronize(decoder.trunk.device)
            times[depth].append(1e3 * (time.perf_counter() - started))
    return np.interp(range(depths[-1] + 1), depths, [median(times[depth]) for depth in depths]).tolist()


def _reading(decoder: Decoder) -> float:
    """Median milliseconds in which the head reads one of many tokens, as it does before its first draft."""
    head, length = decoder.head, min(PROMPT_TOKENS, decoder.context)
    if head is None:
        return 0.0
    device, times = decoder.trunk.device, list[float]()
    ids = torch.zeros(READ_ROWS, length, dtype=torch.long, device=device)
    positions = torch.arange(length, device=device).expand_as(ids)
    states = decoder.trunk.embedding[ids].to(decoder.trunk.dtype)
    for _ in range(REPEATS):
        started = time.perf_counter()
        head(ids, states, positions, head.cache(READ_ROWS, length))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times) / ids.numel()


def _begin(decoder: Decoder, rows: int, depth: int, looked_up: bool, graphs: int) -> Decoding:
    """A batch after its first round, in which the head reads the prompt. Rows with logits that are not finite go on:
    sampling reports them, with their prompt."""
    completion = (REPEATS * (2 if graphs else 1) + 1) * (depth + 1) + 2
    length = max(1, min(PROMPT_TOKENS, decoder.context - completion))
    # With as much room as a controller leaves, so that the graphs are those of the run.
    completion = max(completion, min(graphs, decoder.context) - length + MAX_DEPTH - depth)
    vocabulary = len(decoder.trunk.embedding)
    prompt = Prompt("costs", "", [7 * i % vocabulary for i in range(length)])
    params = SamplingParams(rows, 1.0, completion, draft_tokens=depth, compiled=graphs > 0)
    if looked_up:
        params = replace(params, draft_sources=("siblings",))
    decoding = Decoding(decoder, [prompt], params, aborts=False)
    decoding.forward(depth if looked_up else 0)
    return decoding
