"""A publication as vLLM reads it: the tensors of the checkpoint layout, named, then byte by byte.

With adapters, vLLM's workers keep the weights under them. After the first publication A and B travel, and what else is
trained, and the workers compute W + ΔW, as our own do.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from policies.four_bit import plain_weight
from policies.layout import expert_views
from policies.lora import Adapter
from policies.mtp_layers import head_state, layer_name
from policies.policy import Policy
from policies.sharding import whole
from policies.synced_weights import SyncedWeights

ALIGNMENT = 64  # bytes; every tensor begins at a multiple of it, as inside/quartet_tensors.py reads them


@dataclass(frozen=True)
class Update:
    """What a server is sent: `tensors`. `adapters` has by tensor the names of its A and B among them, and the scale of
    B A.

    `whole`: every tensor is there. Otherwise it is for a server that holds the whole one called `base`, and has what
    can have changed since that one.
    """

    tensors: dict[str, Tensor]
    adapters: dict[str, tuple[str, str, float]]
    base: str
    whole: bool

    def header(self) -> dict[str, Any]:
        return {"tensors": described(self.tensors)} | {
            name: getattr(self, name) for name in ("adapters", "base", "whole")
        }


class Updates:
    """What a server needs of each publication, one after the other. `head`: it drafts, so it needs the MTP head.

    Adapters travel as such where the layout has their tensor under one name, or as experts one by one. `merged` names
    the others, whose tensors travel as W + ΔW.
    """

    def __init__(self, policy: Policy, *, head: bool) -> None:
        self.policy, self.head = policy, head
        self.merged: list[str] = []
        self._last: SyncedWeights | None = None
        self._base = ""
        self._names: dict[str, str] = {}  # of the tensors under adapters, in the layout
        self._under: dict[str, Tensor] = {}  # the tensors of `merged` without their adapters

    def next_update(self, weights: Mapping[str, Tensor]) -> Update:
        """Reads `SyncedWeights.parts`, in order, since other ranks may take part. If what it returns does not arrive,
        call `forget`."""
        now, last = SyncedWeights.of(weights), self._last
        changed = {name: whole(plain_weight(tensor)) for name, tensor in now.changes(last).items()}
        adapters = {name: replace(each, a=whole(each.a), b=whole(each.b)) for name, each in now.adapters.items()}
        first = len(changed) == len(now)
        if first:
            self._base = secrets.token_hex(8)
            self._place(changed, adapters)
        merged = {name: adapters.pop(name).merge(self._under[name]) for name in self.merged}
        tensors, factors = self._layout(changed | merged), {}
        for name, adapter in adapters.items():
            if self.head or not name.startswith("mtp."):
                for layout_name, a_name, a, b in self._factors(name, adapter):
                    b_name = f"{layout_name}.lora_B"
                    tensors[a_name], tensors[b_name] = a, b
                    factors[layout_name] = a_name, b_name, adapter.scale
        self._last = now
        return Update(tensors, factors, self._base, first)

    def forget(self) -> None:
        """The next publication is whole."""
        self._last = None

    @property
    def follows(self) -> bool:
        """Tells whether what was taken last is known to arrive at a server that holds what was before it."""
        return self._last is not None

    def _layout(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return in_checkpoint_layout(
            self.policy, {n: tensor for n, tensor in weights.items() if self.head or not n.startswith("mtp.")}
        )

    def _place(self, tensors: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> None:
        """Note where the layout has the tensors under adapters."""
        names = {id(tensor): name for name, tensor in in_checkpoint_layout(self.policy, tensors).items()}
        self._names, self.merged = {}, []
        for name, adapter in adapters.items():
            if adapter.experts == 1 and not adapter.transposed and id(tensors[name]) in names:
                self._names[name] = names[id(tensors[name])]
            elif adapter.experts > 1 and not adapter.transposed and self.policy.backend == "native":
                part, _, rest = name.partition(".")
                layers = self.policy.config.num_hidden_layers
                self._names[name] = rest if part == "trunk" else layer_name(layers, rest)
            else:
                self.merged.append(name)
        self._under = {name: tensors[name].cpu() for name in self.merged}

    def _factors(self, name: str, adapter: Adapter) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Yields for each tensor of the layout under this adapter its name, the name of A, A [r, in] and B [out, r]."""
        name, a, b, count = self._names[name], adapter.a, adapter.b, adapter.experts
        if count == 1:
            yield name, f"{name}.lora_A", a, b
            return
        a, b = a.reshape(count, -1, a.shape[-1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
        views = list(expert_views(name, b))
        for i, (view_name, view) in enumerate(views):
            e = i * count // len(views)
            yield view_name, f"{name}.{e}.lora_A", a[e], view


def in_checkpoint_layout(policy: Policy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published `weights` of a policy of this shape under the names that its saved checkpoint has.

    A tied LM head is left out, and the draft vocabulary, which vLLM does not know.
    """
    read = {name: whole(tensor) for name, tensor in weights.items()}  # once, in order: other ranks take part
    trunk, head = ({n.removeprefix(p): t for n, t in read.items() if n.startswith(p)} for p in ("trunk.", "mtp."))
    if policy.config.tie_word_embeddings:
        trunk.pop("lm_head.weight", None)
    if policy.backend == "transformers":
        return revert_weight_conversion(policy.trunk, trunk)
    if head:
        trunk |= head_state(policy.config, head)
    return {name: view for stacked, tensor in trunk.items() for name, view in expert_views(stacked, tensor)}


def described(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    """Describes tensors by [name, dtype, shape], in order."""
    return [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]


def length(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that `stream` gives."""
    return sum(tensor.nbytes + -tensor.nbytes % ALIGNMENT for tensor in tensors.values())


def stream(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        yield _bytes(tensor)
        yield memoryview(bytes(-tensor.nbytes % ALIGNMENT))


def first_difference(tensors: Mapping[str, Tensor], held: Mapping[str, str]) -> str | None:
    """The first tensor that vLLM did not load as it was sent; None where there is none.

    hashlib, and not the faster digests of rollout.weight_sync, since vLLM's environment need have nothing else.
    """
    for name, tensor in tensors.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
        if held.get(name) != digest.hexdigest():
            return name
    return next((name for name in held if name not in tensors), None)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
