"""A publication on its way to workers: everything, or what has changed since the last one.

It travels in parts, so that nobody holds a second copy of all weights. Nothing of it is kept afterwards: a worker that
comes later gets it from another worker, or from the learner's own tensors where these are still the same.

With adapters only A and B travel, and what else is trained. The worker keeps the weights under them and computes W + ΔW
into its own copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from policies.four_bit import plain_weight
from policies.sharding import whole
from policies.synced_weights import SyncedWeights
from rollout.faults import RolloutError
from rollout.weight_sync.checksums import Held, checksum_of

PackedTensor = tuple[str, list[int], np.ndarray]
PackedWeights = dict[str, PackedTensor]
PART_BYTES = 1 << 30  # of a message; a tensor is never cut
NOT_AGAIN = (
    "and the learner cannot publish it again in the middle of a step. Go on with --resume auto, and with "
    "rollout.workers of 2 or more, which give each other the weights"
)


class Moved(RolloutError):
    """The learner's tensors are not those that were published."""


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
    """A part of a publication, for workers that hold version `since`; None: for those that may hold anything."""

    version: int
    since: int | None
    first: bool
    last: bool
    tensors: PackedWeights
    adapters: dict[str, tuple[PackedWeights, float, int, bool]]

    @property
    def bytes(self) -> int:
        parts = [self.tensors, *(factors for factors, *_ in self.adapters.values())]
        return sum(data.nbytes for part in parts for _, _, data in part.values())


class Sender:
    """The side of the learner. It keeps the digests of what was published last, and no tensor of its own."""

    def __init__(self, *, cast: torch.dtype | None = None, part_bytes: int = PART_BYTES) -> None:
        """Samplers may hold tensors in the type `cast`. A message is sent from `part_bytes` on."""
        self.cast, self.part_bytes = cast, part_bytes
        self.version: int | None = None
        self._last: SyncedWeights | None = None  # of which the fixed tensors need not be sent again
        self._source = SyncedWeights({})  # references to the learner's tensors
        self._checksums: dict[str, dict[str, str]] = {}  # by tensor and type

    def messages(self, weights: Mapping[str, Tensor], version: int) -> Iterator[Message]:
        """A publication in parts. Each must be put where workers read it before the next is asked for: its tensors may
        be the learner's own memory. If they are not all asked for, the next publication is whole.

        Ranks that share the weights gather what `SyncedWeights.parts` says.
        """
        now, last, former = SyncedWeights.of(weights), self._last, self.version
        self._last = self.version = None
        self._source, changed = now, now.changes(last)
        since = former if len(changed) < len(now) else None
        by_name: dict[str, dict[str, str]] = {}

        def seen(name: str, value: Tensor) -> None:
            by_name[name] = self._checksums_of(value)

        names = now.read(last)
        yield from _messages(now, names, changed, version, since, self.part_bytes, seen)
        self._checksums = {name: by_name[name] if name in by_name else self._checksums[name] for name in now}
        self._last, self.version = now if now.fixed else SyncedWeights({}), version

    def copy_weights(self) -> None:
        """Make a copy, which `again` reads from now on: the learner goes on while samplers still need this version."""
        self._source = self._source.copy()

    def again(self) -> Iterator[Message]:
        """All that was published last, once more from the learner's own tensors. Raises RolloutError where they are
        spread over processes, or are not what was published any more."""
        source, version = self._source, self.version
        assert version is not None
        if any(isinstance(tensor, DTensor) for tensor in source.tensors.values()):
            raise RolloutError(f"no worker is left that holds version {version}, {NOT_AGAIN}")

        def seen(name: str, value: Tensor) -> None:
            if self._checksums_of(value) != self._checksums[name]:
                raise Moved(f"no worker is left that holds version {version}, {NOT_AGAIN}")

        yield from _messages(source, list(source), source.tensors, version, None, self.part_bytes, seen)

    def _checksums_of(self, value: Tensor) -> dict[str, str]:
        kinds = {value.dtype, self.cast or value.dtype}
        return {str(kind).removeprefix("torch."): checksum_of(value.to(kind)) for kind in kinds}

    def difference(self, held: Held) -> str | None:
        """The first tensor that a worker does not hold as it was published, see `first_difference`."""
        for name, digests in self._checksums.items():
            kind, digest = held.get(name, ("", ""))
            if not digest or digests.get(kind) != digest:
                return name
        return next((name for name in held if name not in self._checksums), None)


def _messages(
    weights: SyncedWeights,
    names: Sequence[str],
    sent: Container[str],
    version: int,
    since: int | None,
    part_bytes: int,
    seen: Callable[[str, Tensor], None] = lambda name, value: None,
) -> Iterator[Message]:
    """The tensors that are `sent`, without their adapters, and the adapters of all `names`, in parts. `seen` gets each
    name with its tensor, merged."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        if size >= part_bytes:
            size = 0
            parts.append([])
        parts[-1].append(name)
        size += weights.tensors[name].nbytes
    for part in parts:
        tensors: dict[str, Tensor] = {}
        adapters = {}
        for name in part:
            value = _on_host(plain_weight(weights.tensors[name]))
            if name in sent:
                tensors[name] = value
            if adapter := weights.adapters.get(name):
                adapter = replace(adapter, a=_on_host(adapter.a), b=_on_host(adapter.b))
                factors = pack({"a": adapter.a, "b": adapter.b})
                adapters[name] = factors, adapter.scale, adapter.experts, adapter.transposed
                value = adapter.merge(value)
            seen(name, value)
        yield Message(version, since, part is parts[0], part is parts[-1], pack(tensors), adapters)


def everything(weights: SyncedWeights, version: int, part_bytes: int = PART_BYTES) -> Iterator[Message]:
    """Reads all that a worker gives to one that holds nothing, or something else than it should."""
    return _messages(weights, list(weights), weights.tensors, version, None, part_bytes)


def _on_host(tensor: Tensor) -> Tensor:
    """The whole tensor in the host's memory, which is its own where it is there already."""
    return whole(tensor.detach()).cpu()
