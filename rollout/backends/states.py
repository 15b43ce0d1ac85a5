"""The states of recurrent layers beside our cache, while rows are decoded.

Padding would change a state. So a mixer reads rows of unequal lengths by their length, and a row that waits for its
tools not at all. What follows one token at a time needs no padding, whatever the lengths of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from policies.mixers import States, placed


class RowStates(States):
    """The states of all layers and rows, used like a `RowCache`. Layers that attend hand it their keys and values, too,
    and get them back, since our cache has these. `goes_on`: mixers can read several tokens that follow others."""

    def __init__(self, new_R: Tensor | None = None, goes_on: bool = True) -> None:
        """`new_R`: how many tokens of each row the next forward reads; None: all of them."""
        super().__init__()
        self.new_R, self.goes_on = new_R, goes_on
        self.parts: list[tuple[int, Tensor]] = []  # lengths and their rows, where the forward reads rows by length
        self.number_RS = torch.empty(0)

    def plan(self, new: int) -> None:
        """The next forward is of `new` tokens a row, padding included."""
        new_R, self.new_R, self.parts = self.new_R, None, []
        if new_R is not None and not (self.goes_on and bool((new_R == new).all())):
            self.number_RS = torch.arange(len(new_R) * new, device=new_R.device).view(-1, new)
            self.parts = [(length, (new_R == length).nonzero()[:, 0]) for length in new_R.unique().tolist() if length]

    def read(self, forward: Any, inputs: Any, options: dict[str, Any]) -> Any:
        """Rows of one length together, without what comes after it, for which the output is zero."""
        if not self.parts:
            return forward(*inputs, **options)
        whole = None
        for length, rows in self.parts:
            part = self.take_rows(rows, layer=forward.__self__.layer_idx)
            at_once = length if self.goes_on or not part.tensors else 1
            for start in range(0, length, at_once):
                places = self.number_RS[rows, start : start + at_once]
                of_part, options_of_part = placed((inputs, options), self.number_RS.shape, places)
                out = forward(*of_part, **options_of_part | {"cache": part})
                whole = out.new_zeros(*self.number_RS.shape, out.shape[-1]) if whole is None else whole
                whole[rows, start : start + at_once] = out
            self.put_rows(rows, part)
        return whole

    def advance(self, kept_R: Tensor) -> None:
        """Nothing is rolled back: a model with states has no drafts."""

    def join(self, others: Sequence[RowStates]) -> RowStates:
        """These rows and those of `others`."""
        joined = RowStates(goes_on=self.goes_on)
        for key, state in self.tensors.items():
            joined.tensors[key] = torch.cat([state, *(other.tensors[key] for other in others)])
        return joined

    def take_rows(self, rows: Tensor, new: Tensor | None = None, layer: int | None = None) -> RowStates:
        """A copy of these rows, for a forward of them alone. `put` brings them back."""
        part = RowStates(new, self.goes_on)
        part.tensors = {key: state[rows] for key, state in self.tensors.items() if layer in (None, key[1])}
        return part

    def put_rows(self, rows: Tensor, part: RowStates) -> None:
        """The inverse of `take`."""
        for key, state in part.tensors.items():
            if key not in self.tensors:
                self.tensors[key] = state.new_zeros(len(self.number_RS), *state.shape[1:])
            self.tensors[key][rows] = state

    def update(self, keys: Tensor, values: Tensor, *_: object, **options: object) -> tuple[Tensor, Tensor]:
        """Takes the place of the method of transformers' caches that attention calls, and keeps nothing."""
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
