"""The trunk, and the cache of what it has read of each live row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from policies.decoding.latent_cache import LatentCache
from rollout.rows import Rows

if TYPE_CHECKING:
    from rollout.backends import Cache, Trunk


class Reader:
    """Each live row has a row of the cache, in the same order. In `rollout.decoding.shared_rows` several have one."""

    def __init__(self, trunk: Trunk, records_routing: bool = False) -> None:
        self.trunk, self.records_routing = trunk, records_routing
        self.cache: Any = None  # a Cache; what is more than that depends on the trunk
        self.parts: list[Cache] = []  # the caches of prompts that were just read

    @property
    def latents(self) -> list[LatentCache]:
        """Our own entries: those of layers that are not alike are apart. A cache of transformers has none."""
        if isinstance(self.cache, LatentCache):
            return [self.cache]
        caches = getattr(self.cache, "caches", [self.cache])
        return [cache.latents for cache in caches if hasattr(cache, "latents")]

    def sizes(self) -> list[Tensor]:
        """Numbers that the host has to know of the cache before the next forward. They are read with all else, see
        `know`."""
        if latents := self.latents:
            return [latents[0].lengths_R.max()]  # the rows are as long in all of them
        return self.cache.sizes() if hasattr(self.cache, "sizes") else []

    def know(self, sizes: list[int]) -> None:
        """The `sizes`, in the host's memory. They hold until rows come, go or read."""
        for latents in self.latents:
            latents.known_longest = sizes[0]
        if hasattr(self.cache, "sizes"):
            self.cache.known = sizes

    def clear(self) -> None:
        """No row is live any more."""
        self.cache = None

    def add(self, rows: Rows, cache: Cache, group: int) -> None:
        """The cache of the next prompts, which has `group` rows for each. `join` puts it after that of live rows."""
        self.parts.append(cache)

    def join(self) -> None:
        caches, self.parts = self.parts, []
        if self.cache is None:
            self.cache = caches.pop(0)
        if caches:
            self.cache = self.cache.join(caches)

    def select(self, rows: Tensor) -> None:
        """These rows stay."""
        self.cache.select(rows)

    def part_rows(self) -> None:
        """From now on each live row has its own row of the cache."""

    def read(
        self, rows: Rows, inputs_RS: Tensor, positions_RS: Tensor, some_wait: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The hidden states [R, S, D] and the logits [R, S, V] after these tokens, and their routing, if recorded."""
        states = getattr(self.cache, "states", None)
        if states is not None and some_wait:  # the states of rows that wait for their tools stay as they are
            states.new_R = (~rows.waits).long()
        hidden = self.trunk(inputs_RS, positions_RS, self.cache)
        routing = self.trunk.routing() if self.records_routing else None
        return hidden, self.trunk.logits(hidden), routing

    def advance(self, rows: Rows, kept_R: Tensor) -> None:
        """The cache keeps what the rows keep of the round."""
        self.cache.advance(kept_R)
