"""Recurrent layers of packed rows: what reads tokens one after the other gets each completion after its prompt.

A mixer keeps a state of what it has read, by linear attention, a state space or a convolution. It cannot leave out the
completions that stand between a prompt and another of its completions, as a mask lets attention do. So around it, and
nowhere else, `[prompt | c1 | … | cG]` becomes G rows `[prompt | c]`, padded at the right, where a causal mixer does not
look. It reads the prompt G times; attention, feed-forwards, experts and LM head read it once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from policies.attention import Packing

STATES = {"update_conv_state", "update_recurrent_state"}  # what a mixer calls of transformers' caches


def read_alone(trunk: PreTrainedModel) -> bool:
    """Lets the mixers of a model read packed rows, and tells whether it has any."""
    mixers = [module for module in trunk.modules() if STATES & set(_names_used(type(module).forward))]
    for mixer in mixers:
        mixer.forward = partial(_forward, mixer.forward)
    return bool(mixers)


def _names_used(function: Any) -> tuple[str, ...]:
    return inspect.unwrap(function).__code__.co_names


def _forward(forward: Callable[..., Any], *inputs: Any, packing: Packing | None = None, **options: Any) -> Any:
    """The forward of a mixer. Without `packing` rows are ordinary ones."""
    if packing is None:
        return forward(*inputs, **options)
    places_RL, first_BT = packing.alone
    options |= dict.fromkeys(options.keys() & {"attention_mask"})
    inputs, options = _placed((inputs, options), packing.segment.shape, places_RL)
    return _placed(forward(*inputs, **options), places_RL.shape, first_BT)


def _placed(value: Any, shape: tuple[int, ...], places: Tensor) -> Any:
    """All tensors of `value` that have an entry for each token of rows of this shape, with the tokens at `places`."""
    if isinstance(value, Tensor):
        return value.flatten(0, 1)[places] if value.shape[:2] == shape else value
    if isinstance(value, dict):
        return {key: _placed(entry, shape, places) for key, entry in value.items()}
    return tuple(_placed(entry, shape, places) for entry in value) if isinstance(value, list | tuple) else value
