"""Dense feed-forward -> mixture of experts that computes the same, whose router learns from the first step.

A SwiGLU layer is a sum over its hidden units, so it splits into shards: the first few become the shared expert, the
other k the routed ones. Every expert group gets a copy of all k. Router rows are equal inside a group; with
`topk_group=1` and `num_experts_per_tok=k` a token uses all of one group, each expert with the same score. The
normalised weights are then 1/k, and `routed_scaling_factor=k` makes them 1, which gives the dense sum for any group.

The gradient of a router row is not zero: more weight on one shard is less on the others, and their outputs differ.
Shards cost as much as the dense layer; parameters grow by the copies. The copies start equal; noise separates them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedConfig

from policies.conversion.dense import rebuilt
from policies.conversion.supported import UnsupportedCheckpoint

ROW_MULTIPLE = 8  # torch's grouped_mm needs rows of a multiple of 16 bytes, in bf16 too


@dataclass(frozen=True)
class ExpertShards:
    """How a feed-forward is cut: into shards of intermediate_size / (shared_experts + experts_per_group) units, with
    `expert_groups` copies. The first `dense_layers` stay as they are."""

    shared_experts: int = 2
    experts_per_group: int = 2
    expert_groups: int = 4
    dense_layers: int = 1

    @property
    def shards(self) -> int:
        return self.shared_experts + self.experts_per_group

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError, which names what does not fit the dense model of this `config`."""
        for name, least, why in (
            ("shared_experts", 1, "every MoE layer of DeepSeek-V3 has a shared expert"),
            ("experts_per_group", 2, "the router scores a group by its two best experts"),
            ("expert_groups", 2, "the router needs something to choose from"),
            ("dense_layers", 0, "it counts layers"),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: {why}; use {least} or more")
        if self.dense_layers >= config.num_hidden_layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} leaves no layer of num_hidden_layers={config.num_hidden_layers} to "
                f"experts; use {config.num_hidden_layers - 1} or less"
            )
        width = config.intermediate_size
        if width % self.shards:
            fitting = [n for n in range(3, 33) if width % n == 0]
            raise UnsupportedCheckpoint(
                "intermediate_size",
                width,
                f"it is not a multiple of shared_experts + experts_per_group = {self.shards}",
                f"sums that divide it are {', '.join(map(str, fitting)) or 'none up to 32'}",
            )
        for name, size in (("hidden_size", config.hidden_size), ("intermediate_size", width // self.shards)):
            if size % ROW_MULTIPLE:
                raise UnsupportedCheckpoint(
                    name,
                    getattr(config, name),
                    f"an expert's matrices would have rows of {size} numbers, and grouped products need a multiple of "
                    f"{ROW_MULTIPLE}",
                    "use other numbers of shards, or keep the dense feed-forward with --ffn dense",
                )


@torch.no_grad()
def shard_feed_forward(model: DeepseekV3ForCausalLM, shape: ExpertShards, seed: int = 0) -> DeepseekV3ForCausalLM:
    """Makes a model that computes what `model`, whose layers are all dense, does, with experts after the first
    `shape.dense_layers`. `seed` fixes the router. Raises as `ExpertShards.check` does."""
    shape.check(model.config)
    k, groups = shape.experts_per_group, shape.expert_groups
    config: DeepseekV3Config = copy.deepcopy(model.config)
    config.update(
        {
            "first_k_dense_replace": shape.dense_layers,
            "moe_intermediate_size": config.intermediate_size // shape.shards,
            "n_shared_experts": shape.shared_experts,
            "n_routed_experts": k * groups,
            "num_experts_per_tok": k,
            "n_group": groups,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": float(k),
        }
    )
    state = model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for layer in range(shape.dense_layers, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        gate, up, down = (state.pop(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
        rows_GD = torch.randn(groups, config.hidden_size, generator=generator) * config.initializer_range
        split = _shards(gate, up, down, config, shape)
        split["gate.weight"] = rows_GD.repeat_interleave(k, dim=0)
        split["gate.e_score_correction_bias"] = torch.zeros(k * groups)
        state |= {prefix + name: tensor for name, tensor in split.items()}
    return rebuilt(model, config, state)


@torch.no_grad()
def add_noise(model: DeepseekV3ForCausalLM, noise: float, seed: int = 0) -> None:
    """Separates the copies of each shard by normal noise, `noise` times the root mean square of an expert tensor."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += drawn * (noise * parameter.square().mean().sqrt())


def _shards(
    gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor, config: DeepseekV3Config, shape: ExpertShards
) -> dict[str, Tensor]:
    width, k = config.moe_intermediate_size, shape.experts_per_group
    shared = shape.shared_experts * width
    gate, up = (weight[shared:].view(k, width, -1) for weight in (gate_ID, up_ID))
    down = down_DI[:, shared:].view(len(down_DI), k, width).transpose(0, 1)
    return {
        "shared_experts.gate_proj.weight": gate_ID[:shared],
        "shared_experts.up_proj.weight": up_ID[:shared],
        "shared_experts.down_proj.weight": down_DI[:, :shared],
        "experts.gate_up_proj": torch.cat([gate, up], dim=1).repeat(shape.expert_groups, 1, 1),
        "experts.down_proj": down.repeat(shape.expert_groups, 1, 1),
    }
