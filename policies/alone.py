"""Completions in rows of their own, each after its prompt, for models that cannot read packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Alone:
    """Where the tokens of R rows stand in packed rows [B · T]: `placed_RL`, with -1 in padding, and for each row after
    how many tokens what is its own begins, and where it ends. `own_N` are the places of all that is a row's own: a
    prompt is the first completion's."""

    placed_RL: Tensor
    own_N: Tensor
    starts: Sequence[int]
    stops: Sequence[int]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.placed_RL, self.own_N]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Alone:
        """Return these places with other tensors, such as copies on a device."""
        placed_RL, own_N = tensors
        return replace(self, placed_RL=placed_RL, own_N=own_N)

    def rows(self, token_ids_BT: Tensor) -> Tensor:
        """The tokens of each row [R, L], 0 in padding."""
        return token_ids_BT.flatten()[self.placed_RL.clamp(min=0)].masked_fill(self.placed_RL < 0, 0)

    def packed(self, hidden_RLD: Tensor, shape: Sequence[int]) -> Tensor:
        """The states of packed rows of this shape [B, T, D], from those of each row alone."""
        own = [hidden_RLD[i, start:stop] for i, (start, stop) in enumerate(zip(self.starts, self.stops, strict=True))]
        packed = hidden_RLD.new_zeros(shape[0] * shape[1], hidden_RLD.shape[-1])
        return packed.index_put((self.own_N,), torch.cat(own)).view(*shape, -1)


def alone(segment_BT: Tensor) -> Alone:
    """The rows of packed rows, whose `segment_BT` is in the host's memory.

    >>> alone(torch.tensor([[0, 1, 2, -1]])).placed_RL.tolist()
    [[0, 1], [0, 2]]
    """
    places, starts = [], []
    for b, segment in enumerate(segment_BT):
        for number in range(1, max(int(segment.max()), 1) + 1):
            prompt, completion = (segment == 0).nonzero()[:, 0], (segment == number).nonzero()[:, 0]
            places.append(b * len(segment) + torch.cat([prompt, completion]))
            starts.append(len(prompt) if number > 1 else 0)
    own = [at[start:] for at, start in zip(places, starts, strict=True)]
    placed = nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
    return Alone(placed, torch.cat(own), starts, [len(at) for at in places])
