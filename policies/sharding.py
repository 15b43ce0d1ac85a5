"""A policy that is spread over several processes: by transformers (tensor and expert parallel) and torch (FSDP2).

    fsdp        every rank keeps a share of each weight, and gathers a layer when it needs it
    tensor      MLPs, experts, embedding and LM head are computed in parts, on the same rows
    expert      the routed experts are on different ranks, and tokens travel to them
    replicate   copies of all that, each for other rows

A sharded weight is a DTensor. Everything outside the model's own forward reads it through `whole`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from policies.layout import PolicyError

T = TypeVar("T")


def whole(tensor: Tensor) -> Tensor:
    """The value of a tensor that may be sharded. Every rank must ask for it. Gradients flow to the shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def leave_head_to_us(config: PretrainedConfig) -> PretrainedConfig:
    """By transformers' plan FSDP gathers the LM head in its forward, which we never call: logits are made in chunks.

    Final norm and embedding belong to the root then, which stays gathered from the forward to the backward pass.
    """
    config.base_model_fsdp_plan = {"layers.*": "free_full_weight"}
    return config


def layout_arguments(source: str | Path, layout: DistributedConfig) -> dict[str, Any]:
    """For `from_pretrained`: every rank reads its shards alone. Raises PolicyError where one would get no expert."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    experts, ranks = getattr(config, "n_routed_experts", None) or 0, layout.efsdp_size
    own = experts // layout.ep_size
    if own and -(-own // ranks) * (ranks - 1) >= own:  # FSDP cuts into equal shares, and the last ones can be empty
        raise PolicyError(
            f"learner.parallel: FSDP cannot spread {own} experts over {ranks} ranks, since one would get none; choose "
            "numbers where fsdp x tensor / expert divides n_routed_experts / expert"
        )
    return {"config": leave_head_to_us(config), "distributed_config": layout}


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
        names = ("dp_replicate", "fsdp") if layout.dp_replicate_size > 1 else "fsdp"
        mesh = trunk._mesh_manager.get_mesh(names)
        routers = [part for part in head.to(trunk.device).modules() if isinstance(part, DeepseekV3TopkRouter)]
        for router in routers:  # float32 at any precision, and FSDP gathers one at a time
            fully_shard(router, mesh=mesh)
        fully_shard(head, mesh=mesh)
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


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, sharded as `reference` is."""
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads() -> bool:
    """Whether this process is alone or rank 0."""
    return place()[0] == 0


def everyone(own: T) -> list[T]:
    """What every process gives, on all of them."""
    entries: list[Any] = [own] * place()[1]
    if dist.is_initialized():
        dist.all_gather_object(entries, own)
    return entries


def attend(tensors: Iterable[Tensor]) -> None:
    """Take part while rank 0 reads these tensors `whole`, one after the other."""
    for tensor in tensors:
        whole(tensor)
