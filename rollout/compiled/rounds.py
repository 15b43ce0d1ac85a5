"""When a shard decodes by graphs, and the rows and caches in the sizes that a graph takes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from policies import devices
from policies.decoding.absorbed import AbsorbedTrunk
from policies.decoding.latent_cache import LatentCache, room
from rollout.backends import Decoder
from rollout.compiled import store
from rollout.compiled.graph import Bucket, Inputs, most_rows, takes_any_rows, takes_any_size
from rollout.compiled.recorded import RecordedRound
from rollout.compiled.store import CompiledRound, find
from rollout.cost_table import FEW_ROWS, GRAPH_DEPTHS, MOST_ROWS
from rollout.drafts.head import Drafter
from rollout.rows import Drafted, Rows, Tokens
from rollout.sampling import SamplingParams

ROWS = (1, 2, 4, FEW_ROWS)  # places of a graph that takes no other number
ENTRIES = 128  # caches grow in steps of so many entries
READ = 32  # and what a graph for any number of entries reads of them, in steps of so many
MOST_COPIED = 8192  # entries of shared prompts: a graph reads a copy in each row, and gains a layer what this costs
STOPS = 8  # and the list of stop tokens in steps of so many


def say(bucket: Bucket) -> None:
    drafts = f", {bucket.drafts} drafts" if bucket.drafts else ""
    rows = f"{bucket.rows or f'up to {MOST_ROWS}'} rows"
    print(f"compiling a round of decoding ({rows}{drafts}), once: a minute or two ...", file=sys.stderr)


@dataclass
class Graphs:
    """The graphs of one engine. `compiling` is told before one is compiled."""

    compiling: Callable[[Bucket], None] = say
    loaded: dict[tuple[Bucket, int], CompiledRound | RecordedRound] = field(default_factory=dict)  # by stop tokens, too
    trunk: AbsorbedTrunk | None = None  # to which they are bound
    missing: bool = False  # one of them could not be had, so no further one is tried

    def release(self) -> None:
        """The weights that they are bound to are about to go. The next call binds them to others."""
        self.trunk = None
        for graph in self.loaded.values():
            graph.release()

    def run(self, decoder: Decoder, bucket: Bucket, inputs: Inputs) -> list[Tensor] | None:
        """None where the graph cannot be had. A warning has said why."""
        try:
            graph = self._bound(decoder, bucket, inputs)
        except Exception as error:  # of a compiler, a linker, a loader or a disk, which no round depends on
            self.missing = True
            why = (str(error).strip() or "no reason given").splitlines()[0]
            warnings.warn(
                f"rounds of decoding are not compiled: {type(error).__name__}: {why}. They are decoded eagerly, which "
                f"is slower and gives the same tokens. Compiled ones are kept in {store.FOLDER}; set XDG_CACHE_HOME to "
                "keep them elsewhere, or compile to off",
                stacklevel=2,
            )
            return None
        return graph(inputs)

    def _bound(self, decoder: Decoder, bucket: Bucket, inputs: Inputs) -> CompiledRound | RecordedRound:
        if self.trunk is not decoder.trunk:
            for (each, _), graph in self.loaded.items():
                graph.bind(decoder, each)
            self.trunk = decoder.trunk
        key = bucket, len(inputs.stops)
        if key not in self.loaded:
            graph = find(decoder, bucket, inputs, self.compiling)
            graph.bind(decoder, bucket)
            self.loaded[key] = graph
        return self.loaded[key]


def readable(depth: int) -> int:
    """Tells how many tokens of a row the draft head may have to read in a graph: those that the round before gave."""
    return max(depth, *GRAPH_DEPTHS) + 1


def can_compile(decoder: Decoder, params: SamplingParams) -> bool:
    """Tells whether graphs are asked for, and can be: they compute the draft head's drafts or none, on a CPU or a CUDA
    device. Where a controller chooses how many, it must know what they cost as graphs."""
    trunk = decoder.trunk
    plain = not (params.stop_strings or params.record_routing or params.accept != "exact")
    fits = isinstance(trunk, AbsorbedTrunk) and (trunk.device.type == "cpu" or devices.has_cuda(trunk.device))
    known = params.draft_tokens is not None or (decoder.costs is not None and decoder.costs.graphs is not None)
    missing = decoder.graphs is None or any(graphs.missing for graphs in decoder.graphs)
    return params.compiled and not missing and plain and fits and known


def rounds_of(decoder: Decoder, params: SamplingParams, stops: Tensor) -> Rounds | None:
    """The compiled rounds of a shard; None where no graph can decode it."""
    return Rounds(decoder, params, stops) if can_compile(decoder, params) else None


class Rounds:
    """The compiled rounds of one shard, whose stop tokens are `stops`."""

    def __init__(self, decoder: Decoder, params: SamplingParams, stops: Tensor) -> None:
        assert decoder.graphs is not None
        if not decoder.graphs:
            decoder.graphs.append(Graphs())
        self.graphs: Graphs = decoder.graphs[0]
        self.decoder, self.most_rows = decoder, most_rows(decoder)
        self.any_size, self.any_rows = takes_any_size(decoder.trunk.device), takes_any_rows(decoder)
        self.stops = F.pad(stops, (0, STOPS - len(stops) % STOPS), value=-1)

    def pays(self, live: Rows, cache: LatentCache) -> bool:
        """Tells whether the rows are few, and the prompts that they share short enough to be copied into each."""
        rows, prefix = len(live.index), cache.prefix
        return rows <= self.most_rows and (prefix is None or rows * prefix.longest <= MOST_COPIED)

    def fits(self, live: Rows, depth: int) -> bool:
        """Tells whether the draft head has no more to read than a graph with drafts reads."""
        return int(live.unread.max()) <= readable(depth)

    def __call__(
        self,
        live: Rows,
        cache: LatentCache,
        drafter: Drafter | None,
        depth: int,
        *,
        limit: Tensor | int,
        temperature: Tensor | float,
        start: Tensor | int,
    ) -> Tokens | None:
        """Decode a round with `depth` drafts of each row. The last three are those of all rows, or of each. None where
        there is no graph for it; the rows can be decoded eagerly."""
        count = len(live.index)
        places = count if self.any_rows else next(rows for rows in ROWS if rows >= count)
        head = drafter.ready(live) if depth and drafter else None
        caches = [cache, *([head] if head else [])]
        entries = _arrange(caches, places)
        bucket = Bucket(0 if self.any_rows else places, depth, 0 if self.any_size else entries)
        if self.any_size:
            most = max(each.longest for each in caches) + readable(depth) + depth + 1
            entries = min(entries, -(-most // READ) * READ)

        def of_rows(x: Tensor | float, dtype: torch.dtype) -> Tensor:
            if isinstance(x, Tensor):
                return x.flatten().expand(count).to(dtype)
            return torch.full((count,), x, dtype=dtype, device=live.last.device)

        def of_places(x: Tensor) -> Tensor:
            if count < places:
                x = torch.cat([x, x.new_zeros(places - count, *x.shape[1:])])
            return x.contiguous()

        inputs = Inputs(
            last=of_places(live.last),
            count=of_places(live.count),
            prompt_length=of_places(live.prompt_length),
            lengths=of_places(cache.lengths_R),
            alive=of_places(live.alive),
            limit=of_places(of_rows(limit, torch.long)),
            keys_B2=of_places(live.keys_R2),
            temperature=of_places(of_rows(temperature, torch.float32)),
            start=of_places(of_rows(start, torch.long)),
            stops=self.stops,
            columns=torch.arange(entries, device=live.last.device),
            layers=cache.layers_RTE,
        )
        unread = drafter.unread if drafter else []
        if head and drafter:
            inputs.unread = of_places(live.unread)
            tokens_RS, hidden_RSD = drafter.take_unread(live, readable(depth))
            inputs.unread_tokens_BS, inputs.unread_hidden_BSD = of_places(tokens_RS), of_places(hidden_RSD)
            inputs.head_lengths, inputs.head_layer = of_places(head.lengths_R), head.layers_RTE[0]
        results = self.graphs.run(self.decoder, bucket, inputs)
        if results is None:
            for each in caches:
                each.layers_RTE = [layer[:count] for layer in each.layers_RTE]
            if drafter:
                drafter.unread = unread
            return None
        tokens = Tokens(*(x[:count] for x in results[:5]))
        if depth:
            drafts, accepted = results[5:]
            tokens.drafted, tokens.accepted = Drafted(drafts[:count]), accepted[:count]
        if head:
            head.advance(live.unread)
            live.unread = torch.zeros_like(live.unread)
        return tokens


def _arrange(caches: list[LatentCache], places: int) -> int:
    """Gives the rows of the caches places of their own, where they have none yet. Returns the entries of each."""
    shapes = {(*cache.layers_RTE[0].shape[:2], cache.prefix is None) for cache in caches}
    rows, entries, alone = next(iter(shapes))
    if len(shapes) > 1 or not alone or rows != places or entries % ENTRIES:
        most = max(
            cache.capacity + (0 if cache.prefix is None else cache.prefix.latents_LPTE.shape[2]) for cache in caches
        )
        entries = -(-most // ENTRIES) * ENTRIES
        for cache in caches:
            _own_rows(cache, places, entries)
    return entries


def _own_rows(cache: LatentCache, places: int, entries: int) -> None:
    """Gives every row a copy of its prompt, `entries` entries, and a place among `places`, of which some stay empty."""
    prefix, lengths = cache.prefix, cache.lengths_R
    starts = torch.zeros_like(lengths) if prefix is None else prefix.lengths_P[prefix.row_prompt_R]
    ends = list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
    for layer, latents in enumerate(cache.layers_RTE):
        whole = room((places, entries, latents.shape[2]), dtype=latents.dtype, device=latents.device)
        for row, (start, end) in enumerate(ends):
            if prefix is not None:
                whole[row, :start] = prefix.latents_LPTE[layer, prefix.row_prompt_R[row], :start]
            whole[row, start:end] = latents[row, : end - start]
        cache.layers_RTE[layer] = whole
    cache.lengths_R, cache.prefix, cache.known_longest = starts + lengths, None, None
