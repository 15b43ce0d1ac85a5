"""Recurrent layers of packed rows: every completion goes on from the state in which its prompt has left the layer.

A mixer reads tokens one after the other and keeps a state of them, by linear attention, a state space or a convolution.
No mask can hide a completion of `[prompt | c1 | … | cG]` from the next one. So each mixer reads the prompt, and then
the completions as rows of their own, whose cache holds the prompt's states and lets gradients through. It is right for
mixers that go on from a cache with several tokens. The load check finds those that do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.attention import Packing

UPDATES = {"update_conv_state", "update_recurrent_state"}  # what a mixer calls of transformers' caches


def read_packed(trunk: PreTrainedModel) -> bool:
    """Lets the mixers of a model read packed rows, and tells whether it has any."""
    mixers = [module for module in trunk.modules() if UPDATES & set(_names_used(type(module).forward))]
    for mixer in mixers:
        mixer.forward = partial(_forward, mixer.forward)
    return bool(mixers)


def _names_used(function: Any) -> tuple[str, ...]:
    return inspect.unwrap(function).__code__.co_names


class States:
    """The states of mixers, in place of a cache of transformers, which writes in place and so ends gradients."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, int, int], Tensor] = {}  # by kind, layer, and number in the layer

    def select(self, rows: Tensor) -> None:
        """The states of these rows, or of each several times."""
        self.tensors = {key: state[rows] for key, state in self.tensors.items()}

    def read(self, forward: Callable[..., Any], inputs: Any, options: dict[str, Any]) -> Any:
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


def _forward(forward: Callable[..., Any], *inputs: Any, packing: Packing | None = None, **options: Any) -> Any:
    """The forward of a mixer. Without `packing` rows are ordinary ones. No mask is needed: padding is at the right."""
    if packing is None:
        states = options.get("cache")
        if isinstance(states, States):
            return states.read(forward, inputs, options)
        return forward(*inputs, **options)
    options |= dict.fromkeys(options.keys() & {"attention_mask"})
    parts, order_BT = _parts(packing)
    outputs = []

    def read(places: Tensor, states: States) -> None:
        if places.numel():
            of_part, options_of_part = placed((inputs, options), packing.segment.shape, places)
            outputs.append(forward(*of_part, **options_of_part | {"cache": states}).flatten(0, 1))

    for prompts_PT, completions_RL, prompt_of_R in parts:
        states = States()
        read(prompts_PT, states)
        states.select(prompt_of_R)
        read(completions_RL, states)
    return torch.cat(outputs)[order_BT]


@lru_cache(maxsize=1)  # for all layers
def _parts(packing: Packing) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Prompts of one length each [P, T], their completions [R, L], and the prompt of each completion [R]. The first two
    say which token of all rows stands there, -1 in padding. At last where each token [B, T] stands among all these."""
    segment = packing.segment
    number = torch.arange(segment.numel(), device=segment.device).view_as(segment)
    lengths = (segment == 0).sum(1).tolist()
    parts = []
    for length in sorted(set(lengths)):
        rows = [row for row, other in enumerate(lengths) if other == length]
        counts = [max(0, int(segment[row].max())) for row in rows]
        completions = [
            number[row, segment[row] == completion]
            for row, count in zip(rows, counts, strict=True)
            for completion in range(1, count + 1)
        ]
        two = number.new_full((2,), -1)  # mixers take a single token for a step of decoding, which writes in place
        completions_RL = nn.utils.rnn.pad_sequence([*completions, two], batch_first=True, padding_value=-1)[:-1]
        prompt_of_R = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)).to(segment.device)
        parts.append((number[rows][segment[rows] == 0].view(len(rows), length), completions_RL, prompt_of_R))
    places = torch.cat([x.flatten() for prompts, completions, _ in parts for x in (prompts, completions)])
    real = (places >= 0).nonzero()[:, 0]
    order = torch.zeros_like(number).flatten().index_put((places[real],), real)
    return parts, order.view_as(number)


def placed(value: Any, shape: tuple[int, ...], places: Tensor) -> Any:
    """All tensors of `value` that have an entry for each token of rows of this shape, with the tokens at `places`."""
    if isinstance(value, Tensor):
        return value.flatten(0, 1)[places] if value.shape[:2] == shape else value
    if isinstance(value, dict):
        return {key: placed(entry, shape, places) for key, entry in value.items()}
    return tuple(placed(entry, shape, places) for entry in value) if isinstance(value, list | tuple) else value
