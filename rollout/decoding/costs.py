"""Measures what drafts cost on this machine: the table from which the depth controller chooses a depth."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from policies.decoding.latent_cache import LatentCache
from policies.devices import wait_for
from rollout.backends import Decoder
from rollout.compiled.graph import most_rows, takes_any_size
from rollout.cost_table import GRAPH_DEPTHS, MAX_DEPTH, PROMPT_TOKENS, CostTable, Workload
from rollout.decoding.batch import Batch
from rollout.decoding.shard import Decoding
from rollout.group import Prompt
from rollout.sampling import SamplingParams

REPEATS = 7
READ_ROWS = 4
MOST_TOKENS = 256  # of one verifying forward; deeper drafts of so many rows never paid off
MOST_WRITTEN = 256  # tokens of a row when a round is timed: each way of decoding has a cache of its own


@dataclass(frozen=True)
class Way:
    """How a round is decoded: with so many drafts, and by a graph or eagerly."""

    depth: int
    by_graph: bool = False


def measure(decoder: Decoder, work: Workload, depth: int) -> CostTable:
    """Times rounds of 0, 1, 2, 3, 4, 8, ... `depth` drafts at 1, 2, 4, ... live rows (and at 24, 48, 96), in the
    middle of completions. Between depths it is linear. With `graphs` also compiled rounds, which may have to
    be compiled."""
    sizes, depths = _sizes(work.rows), sorted({0, *_doubling(depth), *range(min(depth, 4))})
    rounds = list[list[float]]()
    for rows in sizes:
        deeper = [k for k in depths if k and rows * (k + 1) <= MOST_TOKENS] if decoder.head is not None else []
        ways = [Way(k) for k in (0, *deeper)]
        rounds.append(_by_depth(_rounds(decoder, work, rows, ways), ways))
    table = CostTable(sizes, rounds, reading=_reading(decoder))
    if not work.graphs or decoder.head is None:
        return table
    ways = [Way(k, by_graph=True) for k in GRAPH_DEPTHS]
    few = [rows for rows in sizes if rows <= most_rows(decoder)]
    return replace(table, graphs=[_by_depth(_rounds(decoder, work, rows, ways), ways) for rows in few])


def _sizes(most: int) -> list[int]:
    """The numbers of rows to time: 1, 2, 4, 8, 16, 24, 32, 48, ... and `most`. At 48 rows a draft costs a tenth of a
    round more than the line from 32 to 64 says, and at 24 as much less: kernels compute rows in blocks.

    >>> _sizes(100)
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]
    """
    doubling = _doubling(most)
    return sorted({*doubling, *(middle for size in doubling if 16 <= size < (middle := size * 3 // 2) < most)})


def _doubling(most: int) -> list[int]:
    """The numbers 1, 2, 4, ... and `most` itself.

    >>> _doubling(6)
    [1, 2, 4, 6]
    """
    return [1 << i for i in range((most - 1).bit_length())] + [most]


def _by_depth(costs: dict[Way, float], ways: list[Way]) -> list[float]:
    """The costs of these ways by depth, from no draft on; linear between the depths that were measured. More drafts
    never cost less: where it looks so, the machine was faster for a moment.

    >>> _by_depth({Way(0): 1.0, Way(1): 2.0, Way(3): 6.0, Way(4): 5.0}, [Way(0), Way(1), Way(3), Way(4)])
    [1.0, 2.0, 4.0, 6.0, 6.0]
    """
    depths = [way.depth for way in ways]
    measured = np.interp(range(max(depths) + 1), depths, [costs[way] for way in ways])
    return np.maximum.accumulate(measured).tolist()


def _rounds(decoder: Decoder, work: Workload, rows: int, ways: list[Way]) -> dict[Way, float]:
    """Milliseconds of a round in each way. The choice depends on their ratios alone. So they take turns, and what
    counts is the median of a turn's ratios to the first way: a slow moment of the machine is one for all.

    A compiled round is timed after another one of its own kind, as in a run. After another kind the processor's caches
    are cold, and it takes up to twice as long.
    """
    decodings = {way: _begin_decoding(decoder, work, rows, way) for way in ways}
    turns = []
    for _ in range(REPEATS):
        times = {}
        for way, decoding in decodings.items():
            if way.by_graph:
                decoding.decode_round()
            started = time.perf_counter()
            decoding.decode_round()
            wait_for(decoder.trunk.device)
            times[way] = 1e3 * (time.perf_counter() - started)
        turns.append(times)
    first = median(times[ways[0]] for times in turns)
    return {way: first * median(times[way] / times[ways[0]] for times in turns) for way in ways}


def _reading(decoder: Decoder) -> float:
    """Median milliseconds in which the draft head reads one of many tokens, as it does before its first draft."""
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
        wait_for(device)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times) / ids.numel()


def _begin_decoding(decoder: Decoder, work: Workload, rows: int, way: Way) -> Decoding:
    """A batch after its first round, in which the draft head reads the prompt, with half of the tokens that a
    completion may have: attention to them is what many drafts cost. A recorded graph attends to all places from the
    start. Rows with logits that are not finite go on: sampling reports them, with their prompt."""
    more = (REPEATS * (2 if way.by_graph else 1) + 1) * (way.depth + 1) + 2
    length = max(1, min(PROMPT_TOKENS, decoder.context - more))
    recorded = way.by_graph and not takes_any_size(decoder.trunk.device)
    written = 0 if recorded else min(work.completion_tokens // 2, MOST_WRITTEN, decoder.context - length - more)
    completion = more + max(0, written)
    if recorded:  # with as much room as a controller leaves, so that the graphs are those of the run
        completion = max(completion, min(work.graphs, decoder.context) - length + MAX_DEPTH - way.depth)
    vocabulary = len(decoder.trunk.embedding)
    prompt = Prompt("costs", "", [7 * i % vocabulary for i in range(length)])
    params = SamplingParams(rows, 1.0, completion, draft_tokens=way.depth, compiled=way.by_graph)
    batch = Batch(decoder, [prompt], params, aborts=False)
    decoding = Decoding(batch)
    decoding.decode_round()
    head = batch.drafts.head
    if written > 0:
        for cache in (*batch.reader.latents, head.cache if head else None):
            if cache is not None:
                _lengthen(cache, written)
        batch.live.count = batch.live.count + written
        if head:
            head.known = None
    return decoding


def _lengthen(cache: LatentCache, tokens: int) -> None:
    """Gives every row so many more tokens, of which each vector is ones."""
    for latents in cache.layers_RTE:
        latents[:, int(cache.lengths_R.min()) : int(cache.lengths_R.max()) + tokens] = 1
    cache.advance(tokens)
