"""Decoding by a model's own forward and cache of transformers, where our cache cannot hold what the model keeps.

Rows of one length are read together without padding, so masks and states are what they are for a row alone. Where the
load check finds that the model heeds padding at the left, rows of every length are decoded together (`joined`). Where
it finds the cache wrong, every row is read anew for each token (`whole`).

Axes: P prompts, G completions each, R rows, S new tokens a row, T tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from policies.attention import attending_by
from policies.lm_head import last_states
from policies.mtp import cast_parameters
from policies.paths import Sampler
from policies.policy import Policy

CACHES = ("cache", "past_key_values", "cache_params", "state")  # what models call it, the newest name first
SEQUENCES = {"keys": -2, "values": -2, "indexer_keys": 1}  # tensors of a layer with an entry for each token, by axis
JOINABLE = {
    *(DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, LinearAttentionLayer),
    *(LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
}


@dataclass
class Part:
    """Rows that are decoded together. They have one `length`, of which the first `pads_R` tokens are padding: all of
    them in a row that has ended. The other rows have padding only if they are `joined`."""

    rows_R: Tensor  # their numbers among all rows
    length: int
    pads_R: Tensor
    cache: Any = None  # transformers'; None: nothing is kept
    joined: bool = False

    def select(self, of_part: Tensor, rows_R: Tensor) -> Part:
        """Some of its rows, or each several times, under new numbers."""
        if self.cache is not None:
            _reorder(self.cache, of_part)
        return replace(self, rows_R=rows_R, pads_R=self.pads_R[of_part])

    def end(self, ended_R: Tensor) -> None:
        """These rows need nothing of what was read."""
        self.pads_R = self.pads_R.masked_fill(ended_R, self.length)

    def trim(self, columns: int) -> None:
        """Drop these first columns, which are padding in every row: else the cache would grow with every row that joins
        after another one has left. One column stays, since a cache without any is taken for a new one."""
        columns = min(columns, self.length - 1)
        if not self.joined or columns <= 0:
            return
        self.length -= columns
        self.pads_R = self.pads_R - columns
        for layer in self.cache.layers:
            _trim_layer(layer, self.length)


class StockPrompts:
    """The parts of prompts that are read once, and then continued by several rows each."""

    def __init__(self, sampler: Sampler, lengths_P: Tensor) -> None:
        self.sampler, self.lengths_P = sampler, lengths_P
        self.parts: list[Part] = []

    def read(self, trunk: StockTrunk, token_ids_PT: Tensor) -> Tensor:
        self.token_ids_PT = token_ids_PT
        self.parts, hidden_PTD = _read_alone(trunk, token_ids_PT, self.lengths_P.tolist())
        return hidden_PTD

    def advance(self, lengths_P: Tensor) -> None:
        """Their lengths were known before."""

    def fan_out(self, group_size: int, capacity: int, longest_prompt: int = 0) -> StockRows:
        """P · G rows that continue these prompts, with room for `capacity` tokens each."""
        each = torch.arange(group_size, device=self.lengths_P.device)
        parts = [
            part.select(
                torch.arange(len(part.rows_R), device=each.device).repeat_interleave(group_size),
                (part.rows_R[:, None] * group_size + each).flatten(),
            )
            for part in self.parts
        ]
        token_ids_RT = F.pad(self.token_ids_PT, (0, capacity)).repeat_interleave(group_size, dim=0)
        return StockRows(self.sampler, parts, token_ids_RT, self.lengths_P.repeat_interleave(group_size))


class StockRows:
    """The rows that are decoded: their parts, and the tokens that they have read."""

    def __init__(
        self,
        sampler: Sampler,
        parts: Sequence[Part],
        token_ids_RT: Tensor,
        lengths_R: Tensor,
        unread_R: Tensor | None = None,
    ) -> None:
        """With `unread_R` the next forward is of rows that `take` has taken, and of so many tokens of each."""
        self.sampler, self.token_ids_RT, self.lengths_R, self.unread_R = sampler, token_ids_RT, lengths_R, unread_R
        self.parts = self._parts(parts)
        self.known: list[int] | None = None  # `sizes`, where the host knows them

    def _parts(self, parts: Sequence[Part]) -> list[Part]:
        joins = self.sampler == "joined" and len(parts) > 1 and _can_join(parts)
        return _trimmed([_joined(parts)] if joins else parts)

    def read(self, trunk: StockTrunk, token_ids_RS: Tensor) -> Tensor:
        sizes = torch.stack(self.sizes()).tolist() if self.known is None else self.known
        lengths, pads = sizes[: len(self.lengths_R)], sizes[len(self.lengths_R) :]
        new = token_ids_RS.shape[1]
        rows = torch.arange(len(lengths), device=self.lengths_R.device)[:, None]
        columns = self.lengths_R[:, None] + torch.arange(new, device=rows.device)
        self.token_ids_RT = F.pad(self.token_ids_RT, (0, max(0, max(lengths) + new - self.token_ids_RT.shape[1])))
        self.token_ids_RT[rows, columns] = token_ids_RS
        if self.unread_R is not None or self.sampler == "whole":
            ends = [length + new for length in lengths]
            if self.unread_R is not None:
                ends = (self.lengths_R + self.unread_R).tolist()
            self.parts, hidden_RTD = _read_alone(trunk, self.token_ids_RT, ends)
            return hidden_RTD[rows, columns.clamp(max=hidden_RTD.shape[1] - 1)]
        states = []
        for part, columns_of_pads in zip(self.parts, pads, strict=True):
            if columns_of_pads == part.length:  # all of its rows have ended; they may have reached the last position
                continue
            part.trim(columns_of_pads)
            states.append((part.rows_R, trunk.forward(token_ids_RS[part.rows_R], part)))
        hidden: Tensor = states[0][1].new_zeros(len(rows), *states[0][1].shape[1:])
        for rows_R, of_part in states:
            hidden[rows_R] = of_part
        return hidden

    def sizes(self) -> list[Tensor]:
        """The lengths of the rows, and the columns of each part that are padding in all of its rows."""
        return [*self.lengths_R.unbind(), *(part.pads_R.min() for part in self.parts)]

    def advance(self, kept_R: Tensor) -> None:
        """Rows that keep none have ended, or wait until `take` reads them anew."""
        self.lengths_R, self.unread_R, self.known = self.lengths_R + kept_R, None, None
        for part in self.parts:
            part.end(kept_R[part.rows_R] == 0)

    def join(self, others: Sequence[StockRows]) -> StockRows:
        """One cache with these rows and those of `others`."""
        caches, before, parts = [self, *others], 0, []
        for cache in caches:
            parts += [replace(part, rows_R=part.rows_R + before) for part in cache.parts]
            before += len(cache.lengths_R)
        width = max(cache.token_ids_RT.shape[1] for cache in caches)
        token_ids = [F.pad(cache.token_ids_RT, (0, width - cache.token_ids_RT.shape[1])) for cache in caches]
        return StockRows(self.sampler, parts, torch.cat(token_ids), torch.cat([cache.lengths_R for cache in caches]))

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in ascending order, and drop the others."""
        number, self.known = torch.full_like(self.lengths_R, -1), None
        number[rows] = torch.arange(len(rows), device=rows.device)
        self.token_ids_RT, self.lengths_R = self.token_ids_RT[rows], self.lengths_R[rows]
        parts = [_renumbered(part, number) for part in self.parts]
        self.parts = _trimmed([part for part in parts if len(part.rows_R)])

    def take_rows(self, rows: Tensor, new: Tensor) -> StockRows:
        """These rows for a forward of `new` tokens each, which reads them from their beginning: while they waited, the
        others went on in the same states."""
        return StockRows(self.sampler, [], self.token_ids_RT[rows], self.lengths_R[rows], new)

    def put_rows(self, rows: Tensor, cache: StockRows) -> None:
        """The rows that `take` took, with what they have read."""
        number = torch.arange(len(self.lengths_R), device=rows.device)
        number[rows] = -1
        parts = [part for part in (_renumbered(part, number) for part in self.parts) if len(part.rows_R)]
        parts += [replace(part, rows_R=rows[part.rows_R]) for part in cache.parts]
        width = max(self.token_ids_RT.shape[1], cache.token_ids_RT.shape[1])
        token_ids, taken = (F.pad(x, (0, width - x.shape[1])) for x in (self.token_ids_RT, cache.token_ids_RT))
        token_ids[rows], self.lengths_R[rows] = taken, cache.lengths_R
        self.token_ids_RT, self.parts, self.known = token_ids, self._parts(parts), None


class StockTrunk:
    """The model for decoding. The policy must have plain weights; its parameters are cast to `dtype` in place."""

    rows_can_part = False  # transformers' caches copy no row

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        cast_parameters(policy.trunk, dtype)
        self.sampler, self.states, self.dtype = policy.paths.sampler, policy.paths.states, dtype
        self.config, self.own_attention, self.trunk = policy.config, policy.own_attention, policy.trunk
        self.embedding = policy.trunk.get_input_embeddings().weight.detach()
        self.logits = policy.output.logits
        self.device: torch.device = self.embedding.device
        reader = policy.trunk if self.states == "head" else policy.trunk.get_decoder()
        self.takes = frozenset(inspect.signature(reader.forward).parameters)

    def cache(self, rows: int, capacity: int, prompts_R: Tensor) -> StockPrompts:
        return StockPrompts(self.sampler, prompts_R)

    def __call__(self, token_ids_BS: Tensor, position_ids_BS: Tensor, cache: StockPrompts | StockRows) -> Tensor:
        """Final hidden states [B, S, D], after the last norm. Positions follow from the cache."""
        return cache.read(self, token_ids_BS)

    def forward(self, token_ids_RS: Tensor, part: Part) -> Tensor:
        """Read the next tokens of a part, and keep what is kept of them."""
        rows, new = token_ids_RS.shape
        options: dict[str, Any] = {"use_cache": self.sampler != "whole"}
        if part.cache is not None:
            options |= {name: part.cache for name in CACHES if name in self.takes}
        if part.cache is not None and "position_ids" in self.takes:
            positions = torch.arange(part.length, part.length + new, device=self.device).expand(rows, -1)
            options["position_ids"] = positions - part.pads_R[:, None] if part.joined else positions
        if part.joined:
            columns = torch.arange(part.length + new, device=self.device)
            options["attention_mask"] = (columns >= part.pads_R[:, None]).long()
        with attending_by(self.config, self.own_attention):
            hidden, out = last_states(self.trunk, self.states, input_ids=token_ids_RS, **options)
        if self.sampler != "whole":
            part.cache = next(cache for name in CACHES if (cache := getattr(out, name, None)) is not None)
        part.length += new
        return hidden


def _read_alone(trunk: StockTrunk, token_ids_RT: Tensor, lengths: Sequence[int]) -> tuple[list[Part], Tensor]:
    """The parts of these rows, read from their beginning, and their hidden states [R, T, D]."""
    parts, hidden = [], None
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    alike = {length: list(rows) for length, rows in groupby(order, key=lengths.__getitem__)}
    of_lengths = torch.tensor(order, device=token_ids_RT.device).split([len(rows) for rows in alike.values()])
    for length, rows in zip(alike, of_lengths, strict=True):
        part = Part(rows, 0, torch.zeros_like(rows))
        states = trunk.forward(token_ids_RT[rows, :length], part)
        if hidden is None:
            hidden = states.new_zeros(len(lengths), max(lengths), states.shape[-1])
        hidden[rows, :length] = states
        parts.append(part)
    assert hidden is not None
    return parts, hidden


def _renumbered(part: Part, number: Tensor) -> Part:
    """The rows of a part that have a number still, by it."""
    stays = (number[part.rows_R] >= 0).nonzero()[:, 0]
    rows = number[part.rows_R[stays]]
    return replace(part, rows_R=rows) if len(stays) == len(part.rows_R) else part.select(stays, rows)


def _reorder(cache: object, rows: Tensor) -> None:
    """These rows of a cache, in place."""
    if isinstance(cache, Cache):
        cache.reorder_cache(rows)
        return
    for name, value in vars(cache).items():
        setattr(cache, name, _indexed(value, rows))


def _indexed(value: object, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.dim() > 1:
        return value[rows]
    if isinstance(value, dict):
        return {key: _indexed(item, rows) for key, item in value.items()}
    return type(value)(_indexed(item, rows) for item in value) if isinstance(value, list | tuple) else value


def _can_join(parts: Sequence[Part]) -> bool:
    return all(
        isinstance(part.cache, Cache) and all(type(layer) in JOINABLE for layer in part.cache.layers) for part in parts
    )


def _joined(parts: Sequence[Part]) -> Part:
    """One part of all rows, the shorter ones padded at the left."""
    length = max(part.length for part in parts)
    cache = copy.copy(parts[0].cache)
    of_layers = zip(*(part.cache.layers for part in parts), strict=True)
    cache.layers = [_joined_layer(layers, [length - part.length for part in parts], length) for layers in of_layers]
    rows = torch.cat([part.rows_R for part in parts])
    pads = torch.cat([part.pads_R + length - part.length for part in parts])
    return Part(rows, length, pads, cache, joined=True)


def _trimmed(parts: Sequence[Part]) -> list[Part]:
    for part in parts:
        if part.joined:
            part.trim(int(part.pads_R.min()))
    return list(parts)


def _joined_layer(layers: Sequence[Any], pads: Sequence[int], length: int) -> Any:
    layer = copy.copy(layers[0])
    if isinstance(layer, LinearAttentionLayer):
        for name in ("conv_states", "recurrent_states"):
            states = [getattr(part, name) for part in layers]
            joined = {key: torch.cat([s[key] for s in states]) for key, one in states[0].items() if one is not None}
            setattr(layer, name, states[0] | joined)
        layer.batch_size = sum(getattr(part, "batch_size", 0) for part in layers)
    room = _room(layer, length)
    for name, axis in SEQUENCES.items():
        entries = [getattr(part, name, None) for part in layers]
        if all(isinstance(x, Tensor) and x.numel() for x in entries):
            setattr(layer, name, torch.cat([_padded(x, pad, axis, room) for x, pad in zip(entries, pads, strict=True)]))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length
    return layer


def _trim_layer(layer: object, length: int) -> None:
    """Keep what a layer holds of the last `length` columns."""
    for name, axis in SEQUENCES.items():
        entries = getattr(layer, name, None)
        if isinstance(entries, Tensor) and entries.numel():
            kept = min(entries.shape[axis], _room(layer, length))
            setattr(layer, name, entries.narrow(axis, entries.shape[axis] - kept, kept))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def _room(layer: object, length: int) -> int:
    """Return how many entries a layer holds of `length` columns."""
    return min(layer.sliding_window - 1, length) if isinstance(layer, DynamicSlidingWindowLayer) else length


def _padded(entries: Tensor, pad: int, axis: int, room: int) -> Tensor:
    """Zeros before the entries of a layer along `axis`, of which it keeps the last `room`."""
    axis %= entries.dim()
    more = min(pad, room - entries.shape[axis])
    return F.pad(entries, (*[0, 0] * (entries.dim() - 1 - axis), max(more, 0), 0))
