"""Recurrent layers of packed rows: every completion goes on from the state in which its prompt has left the layer.

A mixer reads tokens one after the other and keeps a state of them, by linear attention, a state space or a convolution.
No mask can hide a completion of `[prompt | c1 | … | cG]` from the next one. So each mixer reads the prompt, and then
the completions as rows of their own, whose cache holds the prompt's states and lets gradients through. So it goes down
a tree, branch after branch. It is right for mixers that go on from a cache with several tokens. The load check finds
those that do not.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.attention import Packing
from policies.devices import send

UPDATES = {"update_conv_state", "update_recurrent_state"}  # what a mixer calls of transformers' caches


def read_packed(trunk: PreTrainedModel) -> bool:
    """Lets the mixers of a model read packed rows, and tells whether it has any."""
    mixers = [module for module in trunk.modules() if UPDATES & set(_names_used(type(module).forward))]
    for mixer in mixers:
        mixer.forward = partial(_forward, mixer.forward)
    return bool(mixers)


def _names_used(function: Callable[..., object]) -> tuple[str, ...]:
    return inspect.unwrap(function).__code__.co_names


class States:
    """The states of mixers, in place of a cache of transformers, which writes in place and so ends gradients."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, int, int], Tensor] = {}  # by kind, layer, and number in the layer

    def select(self, rows: Tensor) -> None:
        """The states of these rows, or of each several times."""
        self.tensors = {key: state[rows] for key, state in self.tensors.items()}

    def read(self, forward: Callable[..., Any], inputs: tuple, options: dict[str, Any]) -> Any:
        """The forward of a mixer that goes on from here."""
        return forward(*inputs, **options)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.tensors.get(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.tensors.get(("recurrent", layer_idx, state_idx))

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, inputs: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """All that the convolution looks at: the last inputs before these, and these."""
        before = self.get_conv_state(layer_idx, state_idx)
        seen = inputs if before is None else torch.cat([before, inputs], dim=-1)
        size = conv_kernel_size or inputs.shape[-1]
        self.tensors["conv", layer_idx, state_idx] = F.pad(seen, (max(0, size - seen.shape[-1]), 0))[..., -size:]
        return seen

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.tensors["recurrent", layer_idx, state_idx] = state
        return state


def _forward(forward: Callable[..., Any], *inputs: object, packing: Packing | None = None, **options: object) -> Any:
    """The forward of a mixer. Without `packing` rows are ordinary ones. No mask is needed: padding is at the right."""
    if packing is None:
        states = options.get("cache")
        if isinstance(states, States):
            return states.read(forward, inputs, options)
        return forward(*inputs, **options)
    options |= dict.fromkeys(options.keys() & {"attention_mask"})
    placement = packing.placement if isinstance(packing.placement, Parts) else _sent(packing)
    outputs: list[Tensor] = []
    after: list[States] = []
    for part in placement.parts:
        states = States()
        if part.before is not None:
            states.tensors = after[part.before].tensors
            states.select(part.rows)
        if part.places.numel():
            of_part, options_of_part = placed((inputs, options), packing.segment.shape, part.places)
            outputs.append(forward(*of_part, **options_of_part | {"cache": states}).flatten(0, 1))
        after.append(states)
    return torch.cat(outputs)[placement.order_BT]


@dataclass(frozen=True)
class Part:
    """Branches that are read together. `places` [R, L] say which token of all rows stands there, -1 in padding. They go
    on from `rows` [R] of the part with the number `before`; the first ones from nothing."""

    places: Tensor
    before: int | None
    rows: Tensor


@dataclass(frozen=True)
class Parts:
    """The parts of rows in the order in which they are read, and where each token [B, T] stands among all these."""

    parts: Sequence[Part]
    order_BT: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [*(part.places for part in self.parts), *(part.rows for part in self.parts), self.order_BT]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Parts:
        """Return these parts with other tensors, such as copies on a device."""
        *of_parts, order_BT = tensors
        each = zip(self.parts, of_parts, of_parts[len(self.parts) :], strict=False)
        return Parts([Part(places, part.before, rows) for part, places, rows in each], order_BT)


@dataclass(frozen=True)
class Branch:
    """The numbers of its tokens, and the branches that go on from it."""

    places: Tensor
    after: list[Branch]


@lru_cache(maxsize=1)  # for all layers
def _sent(packing: Packing) -> Parts:
    parts = parts_of(packing.on_host)
    return parts.with_tensors(send(parts.tensors, packing.segment.device))


def parts_of(packing: Packing) -> Parts:
    """Branches that others go on from by their lengths, since padding would change what they leave, and together all
    that end a row. The tensors of `packing` are the host's."""
    segment, ends = packing.segment, packing.ends
    number = torch.arange(segment.numel()).view_as(segment)
    two = number.new_full((2,), -1)  # mixers take a single token for a step of decoding, which writes in place
    parts: list[Part] = []

    def read(branches: Sequence[tuple[int, Branch]], before: int | None) -> None:
        """Adds these branches, with their rows of the part before them, and all that comes after them."""
        alike: dict[int, list[tuple[int, Branch]]] = defaultdict(list)
        for row, branch in branches:
            ended = before is not None and not branch.after
            alike[-1 if ended else len(branch.places)].append((row, branch))
        for length, these in sorted(alike.items(), key=lambda item: item[0]):
            places = [branch.places for _, branch in these] + ([two] if length < 0 else [])
            places_RL = nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)[: len(these)]
            parts.append(Part(places_RL, before, torch.tensor([row for row, _ in these])))
            ahead = [(row, one) for row, (_, branch) in enumerate(these) for one in branch.after]
            if ahead:
                read(ahead, len(parts) - 1)

    read(list(enumerate(map(_first_branch, segment, ends, number))), None)
    places = torch.cat([part.places.flatten() for part in parts])
    real = (places >= 0).nonzero()[:, 0]
    order = torch.zeros_like(number).flatten().index_put((places[real],), real)
    return Parts(parts, order.view_as(number))


def _first_branch(segment_T: Tensor, ends_T: Tensor, number_T: Tensor) -> Branch:
    """The tree of a row. Its first branch has no tokens where rows have no prompt."""
    last = int(segment_T.max())
    first = Branch(number_T[segment_T == 0], [])
    way = [(last, first)]  # the branches on the way to the one that is read, each with the last one after it
    for of_branch in (segment_T == branch for branch in range(1, last + 1)):
        branch = Branch(number_T[of_branch], [])
        while way[-1][0] < int(segment_T[of_branch][0]):
            way.pop()
        way[-1][1].after.append(branch)
        way.append((int(ends_T[of_branch][0]), branch))
    return first


def placed(value: object, shape: tuple[int, ...], places: Tensor) -> Any:
    """All tensors of `value` that have an entry for each token of rows of this shape, with the tokens at `places`."""
    if isinstance(value, Tensor):
        return value.flatten(0, 1)[places] if value.shape[:2] == shape else value
    if isinstance(value, dict):
        return {key: placed(entry, shape, places) for key, entry in value.items()}
    return tuple(placed(entry, shape, places) for entry in value) if isinstance(value, list | tuple) else value
