"""What a policy publishes: every tensor on which sampling depends, and which of them can change.

A policy with adapters learns A and B alone. A sampler that keeps the weights under them needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor
from torch.distributed.tensor import DTensor

from policies.four_bit import plain_weight
from policies.lora import Adapter


class SyncedWeights(Mapping[str, Tensor]):
    """The published tensors by name. One with an adapter is merged, W + ΔW, whenever it is read, one in 4 bits gets its
    numbers then, and nothing else is copied.

    `tensors` are those without their adapters, and `adapters` those of some of them. `fixed` names the ones that
    stay as they are while the adapters learn; without adapters there are none.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        adapters: Mapping[str, Adapter] | None = None,
        fixed: frozenset[str] = frozenset(),
    ) -> None:
        self.tensors, self.adapters, self.fixed = dict(tensors), dict(adapters or {}), fixed
        # Where the fixed tensors are, and how often they have been written to. Of those under adapters nobody knows:
        # peft replaces routed experts in every forward, and torch counts it as a write.
        self.marks = {}
        for name in fixed & self.tensors.keys():
            tensor = self.tensors[name]
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self.marks[name] = local.data_ptr(), 0 if name in self.adapters else local._version

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> SyncedWeights:
        """The publication of tensors that nobody knows more about."""
        return weights if isinstance(weights, SyncedWeights) else cls(weights)

    def copy(self) -> SyncedWeights:
        """A publication with copies of what a learner changes."""
        tensors = {name: t if name in self.fixed else t.detach().clone() for name, t in self.tensors.items()}
        adapters = {n: replace(x, a=x.a.detach().clone(), b=x.b.detach().clone()) for n, x in self.adapters.items()}
        return SyncedWeights(tensors, adapters, self.fixed)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return self.adapters[name].merge(tensor) if name in self.adapters else plain_weight(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def changes(self, since: SyncedWeights | None) -> dict[str, Tensor]:
        """The tensors, without their adapters, that somebody needs who has those of `since`, which gave its adapters
        too; None: all. Ranks that share a policy get the same names in the same order."""
        if since is None or not self.fixed or self.marks != since.marks:
            return self.tensors
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.fixed}

    def read(self, since: SyncedWeights | None) -> list[str]:
        """The tensors that are read for somebody who has those of `since`: the changes, and those under adapters, whose
        merged value he confirms."""
        changes = self.changes(since)
        return [name for name in self.tensors if name in changes or name in self.adapters]

    def parts(self, since: SyncedWeights | None) -> Iterator[Tensor]:
        """All that somebody needs then, in this order: the changes, and A and B of each adapter."""
        yield from self.changes(since).values()
        for adapter in self.adapters.values():
            yield from (adapter.a, adapter.b)

    def read_parts(self, since: SyncedWeights | None) -> Iterator[Tensor]:
        """Yields what `read` names, in this order: each tensor, and A and B of its adapter."""
        for name in self.read(since):
            yield self.tensors[name]
            if adapter := self.adapters.get(name):
                yield from (adapter.a, adapter.b)
