"""A publication on its way to a worker: everything, or what has changed since the last one.

With adapters only A and B travel, and what else is trained. The worker keeps the weights under them and computes W + ΔW
into its own copy. Of tensors that changed, the compressed difference can travel (deltas.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from policies.publication import Publication
from policies.sharding import whole
from rollout.publication import deltas as delta
from rollout.publication.digests import Held, digest_of

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
    deltas: PackedWeights = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        parts = [self.tensors, self.deltas, *(factors for factors, *_ in self.adapters.values())]
        return sum(data.nbytes for part in parts for _, _, data in part.values())


class Sender:
    """The pool's side: a copy of what was published last, on the host, for the workers that are yet to come."""

    def __init__(self, *, deltas: bool = False) -> None:
        """`deltas`: send the difference to the version before where it is shorter."""
        self.deltas = deltas
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
        partial, differences = len(changed) < len(now), dict[str, PackedTensor]()
        if self.deltas and former is not None and now.keys() == self.weights.keys() and last is not None:
            differences = self._differences(changed)
        self.weights = Publication((self.weights.tensors if partial else {}) | changed, adapters, now.fixed)
        self._last, self.version = now if now.fixed else Publication({}), version  # no merged tensor is kept
        self._digests = {}
        sent = {name: tensor for name, tensor in changed.items() if name not in differences}
        since = former if partial or differences else None
        return replace(self._message(sent, since), deltas=differences)

    def _differences(self, tensors: Mapping[str, Tensor]) -> PackedWeights:
        """Of those that have kept type and shape, and for which a difference pays."""
        new, old, found = pack(tensors), pack({name: self.weights.tensors[name] for name in tensors}), {}
        for name, (kind, shape, data) in new.items():
            same = old[name][:2] == (kind, shape) and data.size
            packed = delta.encode(data, old[name][2], data.nbytes // tensors[name].numel()) if same else None
            if packed is not None:
                found[name] = kind, shape, packed
        return found

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


def with_differences(own: Mapping[str, Tensor], deltas: PackedWeights) -> dict[str, Tensor]:
    """The new tensors. Raises ValueError where the own one has another type or shape."""
    new = {}
    for name, (kind, shape, old) in pack({name: own[name] for name in deltas if name in own}).items():
        if (kind, shape) != deltas[name][:2]:
            raise ValueError(name)
        new[name] = kind, shape, delta.decode(deltas[name][2], old, own[name].element_size())
    return unpack(new)


def _copied(tensor: Tensor) -> Tensor:
    """The whole tensor on the host, in memory of its own."""
    value = whole(tensor.detach())
    return value.cpu() if value.device.type != "cpu" else value.clone()
