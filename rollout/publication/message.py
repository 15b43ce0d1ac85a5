"""A publication on its way to a worker: everything, or what has changed since the last one.

With adapters only A and B travel, and what else is trained. The worker keeps the weights under them and computes W + ΔW
into its own copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from policies.lora import Adapter
from policies.publication import Publication
from policies.sharding import whole
from rollout.engine import Engine, RolloutError
from rollout.publication.digests import Held, digest_of, digests

PackedTensor = tuple[str, list[int], np.ndarray]
PackedWeights = dict[str, PackedTensor]


def pack(weights: Mapping[str, Tensor]) -> PackedWeights:
    """Tensors as bytes with type and shape, since Ray shares NumPy arrays without a copy and NumPy has no bfloat16."""
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            whole(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in weights.items()
    }


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    """Tensors in the memory of what was packed, which Ray may share with others: they are to be read only."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that NumPy forbids to write
        return {
            name: (torch.from_numpy(data) if data.size else torch.tensor([])).view(getattr(torch, dtype)).reshape(shape)
            for name, (dtype, shape, data) in packed.items()
        }


@dataclass(frozen=True)
class Message:
    """What a worker needs that holds version `since`; None: what a new one needs."""

    version: int
    since: int | None
    tensors: PackedWeights
    adapters: dict[str, tuple[PackedWeights, float, int, bool]]

    @property
    def bytes(self) -> int:
        parts = [self.tensors, *(factors for factors, *_ in self.adapters.values())]
        return sum(data.nbytes for part in parts for _, _, data in part.values())


class Sender:
    """The pool's side: a copy of what was published last, on the host, for the workers that are yet to come."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.weights = Publication({})  # the copy
        self._last: Publication | None = None  # what it was copied from
        self._digests: dict[tuple[str, str], str] = {}

    def take(self, weights: Mapping[str, Tensor], version: int) -> Message:
        """Copies a publication, tensor by tensor where it is sharded. What it returns is for the workers that hold the
        one before."""
        now, last, former = Publication.of(weights), self._last, self.version
        self._last = self.version = None  # if this is cut short, the next publication is whole
        changed = {name: _copied(tensor) for name, tensor in now.changes(last).items()}
        adapters = {
            name: replace(adapter, a=_copied(adapter.a), b=_copied(adapter.b)) for name, adapter in now.adapters.items()
        }
        partial = len(changed) < len(now)
        self.weights = Publication((self.weights.tensors if partial else {}) | changed, adapters, now.fixed)
        self._last, self.version = now, version
        self._digests = {}
        return self._message(changed, former if partial else None)

    def everything(self) -> Message:
        """For a worker that holds nothing, or something else than it should."""
        return self._message(self.weights.tensors, None)

    def _message(self, tensors: Mapping[str, Tensor], since: int | None) -> Message:
        assert self.version is not None
        adapters = {
            name: (pack({"a": adapter.a, "b": adapter.b}), adapter.scale, adapter.experts, adapter.transposed)
            for name, adapter in self.weights.adapters.items()
        }
        return Message(self.version, since, pack(tensors), adapters)

    def difference(self, held: Held) -> str | None:
        """The first tensor that a worker does not hold as it was published, see `first_difference`."""
        weights = self.weights
        for name in weights:
            kind, found = held.get(name, ("", ""))
            if kind and (name, kind) not in self._digests:
                self._digests[name, kind] = digest_of(weights[name].to(getattr(torch, kind)))
            if found != self._digests.get((name, kind)):
                return name
        return next((name for name in held if name not in weights), None)


class Receiver:
    """The worker's side: an engine, and the weights under its adapters."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._under: dict[str, Tensor] = {}

    def take(self, message: Message) -> Held:
        """Loads a publication; returns the digests of what the engine's policy holds then."""
        engine = self.engine
        if message.since is not None and engine.version != message.since:
            raise RolloutError(
                f"a worker holds policy version {engine.version}, and what it got follows version {message.since}"
            )
        engine.version = -1  # while it is neither the old one nor the new one
        weights = unpack(message.tensors)
        if message.since is None:
            self._under = {name: weights[name].clone() for name in message.adapters}
        else:
            weights = engine.policy.weights() | weights
        for name, (factors, scale, experts, transposed) in message.adapters.items():
            adapter = Adapter(**unpack(factors), scale=scale, experts=experts, transposed=transposed)
            weights[name] = adapter.merge(self._under[name])
        engine.publish(weights, message.version)
        return digests(engine.policy.weights())


def _copied(tensor: Tensor) -> Tensor:
    """The whole tensor on the host, in memory of its own."""
    value = whole(tensor.detach())
    return value.cpu() if value.device.type != "cpu" else value.clone()
