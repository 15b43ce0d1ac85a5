"""A policy that is spread over several processes: by transformers (tensor and expert parallel) and torch (FSDP2).

    fsdp        every rank keeps a share of each weight, and gathers a layer when it needs it
    tensor      MLPs, experts, embedding and LM head are computed in parts, on the same rows
    expert      the routed experts are on different ranks, and tokens travel to them
    replicate   copies of all that, each for other rows

A sharded weight is a DTensor. Everything outside the model's own forward reads it through `whole`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from policies.layout import PolicyError

T = TypeVar("T")
AT_ONCE = 5e9  # bytes of whole layers that are gathered for one file
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")  # names of their number


def whole(tensor: Tensor) -> Tensor:
    """The value of a tensor that may be sharded. Every rank must ask for it. Gradients flow to the shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, sharded as `reference` is."""
    if not isinstance(reference, DTensor):
        return tensor
    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(tensor.to(reference.device), mesh, placements, src_data_rank=None)


@dataclass(frozen=True)
class Split:
    """How tensor or expert parallel splits a weight: over the ranks of `mesh`, along `placement.dim`."""

    mesh: DeviceMesh
    placement: Shard

    @classmethod
    def of(cls, weight: Tensor) -> Split | None:
        """Tells how a weight is split; None where neither splits it."""
        if isinstance(weight, DTensor):
            for name, placement in zip(weight.device_mesh.mesh_dim_names or (), weight.placements, strict=True):
                if name in ("tp", "ep") and (mesh := weight.device_mesh[name]).size() > 1:
                    return cls(mesh, placement)
        return None

    def part(self, factor: Tensor, whole: int | None = None) -> Tensor:
        """This rank's part of a whole factor that has the dimensions of the weight, except for `kept`."""
        if self.placement.dim == whole:
            return factor
        parts, _ = self.placement._split_tensor(factor, self.mesh.size(), with_padding=False, contiguous=False)
        return parts[self.mesh.get_local_rank()]


def routed_experts(config: PretrainedConfig) -> int:
    """Tells how many routed experts a layer has; each architecture has its own name for that. 0: none.

    >>> from transformers import Qwen3MoeConfig
    >>> routed_experts(Qwen3MoeConfig(num_experts=64)), routed_experts(PretrainedConfig())
    (64, 0)
    """
    named = config.to_dict()  # attributes may be refused where layers differ
    return next((named[name] for name in EXPERTS if isinstance(named.get(name), int)), 0)


def layout_arguments(source: str | Path, layout: DistributedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`, by which every rank reads its shards alone. Raises PolicyError where one would
    get no expert."""
    from policies.files import hub

    config = AutoConfig.from_pretrained(**hub.arguments(source), trust_remote_code=False)
    experts, ranks = routed_experts(config) // layout.ep_size, layout.efsdp_size
    # FSDP cuts into equal shares, and the last ones can be empty.
    if experts and -(-experts // ranks) * (ranks - 1) >= experts:
        raise PolicyError(
            f"learner.parallel: FSDP cannot spread {experts} experts over {ranks} ranks, since one would get none; "
            f"choose numbers where fsdp x tensor / expert divides {routed_experts(config)} / expert"
        )
    # Final norm, embedding and LM head belong to the root then, which stays gathered until the backward pass. By the
    # plan of transformers FSDP gathers the LM head in its forward, which we never call: logits are made in chunks.
    config.base_model_fsdp_plan = {"layers.*": "free_full_weight"}
    return {"config": config, "distributed_config": layout}


def wrap(trunk: PreTrainedModel, head: nn.Module | None) -> None:
    """Shard the draft head as the trunk is, and let FSDP gather weights for the methods that we call."""
    layout = getattr(trunk.config, "distributed_config", None)
    if layout is None:
        return
    trunk.config.distributed_config = None  # else save_pretrained gathers again what it is given, and writes it down
    vars(trunk.config).pop("base_model_fsdp_plan", None)
    if not isinstance(trunk, FSDPModule):
        return
    trunk.decode = MethodType(lambda self, **inputs: self.get_decoder()(**inputs), trunk)
    register_fsdp_forward_method(trunk, "decode")
    if head is not None:
        mesh = trunk._mesh_manager.get_mesh(("dp_replicate", "fsdp") if layout.dp_replicate_size > 1 else "fsdp")
        routers = [part for part in head.to(trunk.device).modules() if isinstance(part, DeepseekV3TopkRouter)]
        for part in [*routers, head]:  # routers are float32 at any precision, and FSDP gathers one at a time
            fully_shard(part, mesh=mesh)
        register_fsdp_forward_method(head, "unroll")


def decoder(trunk: PreTrainedModel) -> Callable[..., Any]:
    """The forward of `trunk` without its LM head."""
    return trunk.decode if isinstance(trunk, FSDPModule) else trunk.get_decoder()


def gathered(module: nn.Module) -> Tensor:
    """The whole weight of a module whose forward is not called. FSDP frees it after the next backward pass."""
    if isinstance(module, FSDPModule):
        module.unshard()
    return whole(module.weight)


def release(module: nn.Module) -> None:
    """Free what FSDP has gathered and no backward pass has freed, so that parameters are the shards again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gathered_parts(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The whole tensors of `state` on rank 0, some layers at a time. All ranks take part; the others get nothing."""
    layers = defaultdict(list)
    for name in state:
        numbered = re.match(r".*?\.\d+\.", name)
        layers[numbered[0] if numbered else ""].append(name)
    part, size = {}, 0
    for names in layers.values():
        for name in names:
            value = whole(state[name])
            if leads():
                part[name] = value.cpu() if isinstance(state[name], DTensor) else value
            size += value.nbytes
        if size >= AT_ONCE:
            yield part
            part, size = {}, 0
    if part:
        yield part


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads() -> bool:
    """Tells whether this process is alone or rank 0."""
    return place()[0] == 0


def everyone(value: T) -> list[T]:
    """Gathers what every process gives, on all of them."""
    entries: list[Any] = [value] * place()[1]
    if dist.is_initialized():
        dist.all_gather_object(entries, value)
    return entries
