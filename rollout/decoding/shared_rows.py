"""Decoding groups whose completions begin alike: rows that have sampled the same tokens are one row of the cache.

Given the same tokens the trunk says the same of what comes next, and the keyed noise of each completion then chooses
its own. So no token changes, and a group costs as many rows as it has different completions. Where a policy is sure of
its answers that is few: of eight completions of the demo's problems three differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollout.decoding.reader import Reader
from rollout.rows import Rows

if TYPE_CHECKING:
    from rollout.backends import Cache, Trunk


class SharedReader(Reader):
    """`place_R` is the row of the cache that a live row has.

    Rows part when they choose different tokens, and for good before the first round with drafts: the draft head reads
    each row by itself.
    """

    def __init__(self, trunk: Trunk, records_routing: bool = False) -> None:
        super().__init__(trunk, records_routing)
        self.shares = True  # until rows part for good
        self.place_R = torch.empty(0, dtype=torch.long, device=trunk.device)

    def clear(self) -> None:
        super().clear()
        self.place_R = self.place_R[:0]

    def add(self, rows: Rows, cache: Cache, group: int) -> None:
        place_R = torch.arange(len(rows.index) // group, device=rows.index.device).repeat_interleave(group)
        if self.shares:
            place_R, parents = parted(place_R, rows)
            cache.select(parents * group)
        self.place_R = torch.cat([self.place_R, place_R + self._places()])
        super().add(rows, cache, group)

    def _places(self) -> int:
        """Counts the rows of the cache."""
        return int(self.place_R.max()) + 1 if len(self.place_R) else 0

    def select(self, rows: Tensor) -> None:
        if self.shares:
            rows, self.place_R = torch.unique(self.place_R[rows], return_inverse=True)
        super().select(rows)

    def part_rows(self) -> None:
        if self.shares:
            super().select(self.place_R)
            self.shares = False

    def read(
        self, rows: Rows, inputs_RS: Tensor, positions_RS: Tensor, some_wait: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.shares:
            return super().read(rows, inputs_RS, positions_RS, some_wait)
        first = first_of(self.place_R, rows.alive)
        hidden, logits, routing = super().read(rows, inputs_RS[first], positions_RS[first], some_wait)
        place_R = self.place_R
        return hidden[place_R], logits[place_R], None if routing is None else routing[place_R]

    def advance(self, rows: Rows, kept_R: Tensor) -> None:
        if not self.shares:
            return super().advance(rows, kept_R)
        kept = kept_R.new_zeros(self._places()).scatter_reduce(0, self.place_R, kept_R, "amax")
        super().advance(rows, kept)
        place_R, parents = parted(self.place_R, rows)
        if len(torch.unique(parents)) < len(parents):  # else all that share a place still agree
            self.place_R = place_R
            super().select(parents)


def parted(place_R: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Gives rows that have chosen different tokens different places: those of all rows, and of each the one before.

    Rows that have ended choose nothing: they get the place of the live row before them, so that rows of one prompt stay
    neighbours, and all that they read is dropped.

    >>> place_R, last, alive = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([5, 5, 9, 7, 7]), torch.ones(5).bool()
    >>> parted(place_R, SimpleNamespace(last=last, alive=alive))
    (tensor([0, 0, 1, 2, 2]), tensor([0, 0, 1]))
    """
    width = int(rows.last.max()) + 1
    choices = place_R * width + rows.last
    different = torch.unique(choices[rows.alive])
    if not len(different):
        return place_R, torch.arange(int(place_R.max()) + 1, device=place_R.device)
    numbers = torch.arange(len(place_R), device=place_R.device)
    before = numbers.where(rows.alive, -1).cummax(0).values
    place = torch.searchsorted(different, choices)[before.where(before >= 0, rows.alive.int().argmax())]
    return place, different // width


def first_of(place_R: Tensor, alive_R: Tensor) -> Tensor:
    """The first row of each place that is alive, or the first of all where none is.

    >>> first_of(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([False, True, True, False, False]))
    tensor([1, 2, 3])
    """
    count = len(place_R)
    numbers = torch.arange(count, device=place_R.device)
    order = numbers + count * ~alive_R
    first = place_R.new_full((int(place_R.max()) + 1,), 2 * count).scatter_reduce(0, place_R, order, "amin")
    return first % count
