"""What one rank of `learner.parallel` holds of a policy, by the plans of transformers and FSDP2 (policies/sharding.py).

    replicate   nothing is shared between the copies
    fsdp        the first dimension of every weight is cut, and rounded up
    tensor      MLPs, experts, embedding and LM head are cut before that, along one of their dimensions
    expert      whole experts are dealt out instead, and what is left of the ranks cuts each share again

Adapters, the value head and buffers are whole on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from grpo.config.learner import ParallelOptions
from grpo.learner.eight_bit import block_of

BY_TENSOR = ("mlp.", "embed_tokens.", "lm_head.")  # the parts of the trunk that tensor parallelism cuts


@dataclass(frozen=True)
class Shares:
    """So many ranks share a learner, and in this way. Without arguments it is one process."""

    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    replicate: int = 1

    @classmethod
    def of(cls, options: ParallelOptions, processes: int = 0) -> Shares:
        """Makes the shares for so many processes; 0: those that were launched with this one, else as many as the
        options imply. Raises ValueError as `ParallelOptions.shares` does."""
        implied = options.tensor * (options.fsdp or 1)
        size = processes or int(os.environ.get("WORLD_SIZE", "0")) or implied
        fsdp, copies = options.shares(size)
        return cls(fsdp, options.tensor, options.expert, copies)

    @property
    def ranks(self) -> int:
        return self.replicate * self.fsdp * self.tensor

    @property
    def gathers(self) -> bool:
        """FSDP wraps the policy, which it does for copies too."""
        return self.replicate * self.fsdp > 1

    def visiting(self, name: str, weight: Tensor) -> float:
        """Returns how many numbers of `weight` a rank computes with, once FSDP has gathered them."""
        if ".lora_" in name or name.startswith("mtp."):
            return weight.numel()
        if ".experts." in name and self.expert > 1:
            return weight.numel() / self.expert
        is_router = ".gate." in name  # it is whole
        return weight.numel() / (self.tensor if any(part in name for part in BY_TENSOR) and not is_router else 1)

    def held(self, name: str, weight: Tensor) -> float:
        """Returns how many numbers of `weight` a rank keeps, rank 0 where they differ.

        >>> import torch
        >>> one, names = torch.empty(128, 64, 32), ("trunk.model.layers.1.mlp.experts.down_proj", "mtp.eh_proj.weight")
        >>> [Shares(fsdp=8, expert=8).held(name, one) / one.numel() for name in names]      # each expert whole
        [0.125, 0.125]
        >>> Shares(fsdp=4, tensor=2).held("trunk.lm_head.weight", torch.empty(49152, 576)) == 49152 * 576 / 8
        True
        """
        if ".lora_" in name or not weight.dim():
            return weight.numel()
        there, rows, over = self.visiting(name, weight), weight.shape[0], self.fsdp
        if ".experts." in name and self.expert > 1 and not name.startswith("mtp."):
            rows, over = rows // self.expert, self.fsdp * self.tensor // self.expert
        return there * ceil(rows / over) / rows

    def gathered_bytes(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        """Returns bytes that FSDP has whole beside the shares: (what is in no layer, the largest layer). The first is
        gathered from the forward to the backward pass, and FSDP keeps a buffer of that size (measured). Of layers it
        holds four at a time: one's weights, those of the next that is under way, the gradient of one, and that gradient
        on its way to the shards."""
        sizes: dict[str, float] = {"": 0.0}
        for name, weight in weights.items() if self.gathers else ():
            layer = name.split(".layers.", 1)[1].split(".", 1)[0] if ".layers." in name else ""
            if ".lora_" not in name:
                sizes[layer] = sizes.get(layer, 0.0) + self.visiting(name, weight) * weight.element_size()
        return sizes.pop(""), max(sizes.values(), default=0.0)


def largest_bytes(weights: Iterable[Tensor], itemsize: int) -> int:
    """Returns the size of the largest weight, which visits a rank whole when it is loaded, published or saved."""
    return max((weight.numel() for weight in weights), default=0) * itemsize


def moment_bytes(weight: Tensor) -> float:
    """Returns the bytes of AdamW's two moments in 8 bits, for a number of this weight."""
    block = block_of(weight)
    return 2 + 8 / block if block else 8
