"""Dynamic heads: of every token some attention heads compute, and a router in each layer chooses them.

A mixture of attention heads (Jin et al. 2024, arXiv:2410.11842, section 3.2), with DeepSeek-V3's router in place of two
softmaxes, so that what balances experts balances them too. The first `shared_heads` always compute, with weight
1. Of the R others the router chooses k by score + bias, and weighs a chosen one by twice its score, which is 1 where
its logit is 0. So a policy that keeps all of its attention heads, with routers of zeros, computes what it did before.

config.json                         model_type: deepseek_v3_dynamic_heads, active_heads = shared + k, shared_heads
model.layers.{l}.self_attn.gate     weight [R, D], e_score_correction_bias [R]; both float32

No other program knows this type, so stock transformers and vLLM refuse such a checkpoint by its name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from policies.attention import ATTENTION
from policies.four_bit import is_held
from policies.layout import PolicyError


class DynamicHeadsConfig(DeepseekV3Config):
    """The configuration: `active_heads` compute for a token, the first `shared_heads` and those that a router
    chooses."""

    model_type = "deepseek_v3_dynamic_heads"
    active_heads: int = 2
    shared_heads: int = 1


class HeadRouter(DeepseekV3TopkRouter):
    """The router of one layer's attention heads. Its outputs number those after the shared ones from 0."""

    def __init__(self, config: DynamicHeadsConfig) -> None:
        chosen = config.active_heads - config.shared_heads
        self.sizes = DeepseekV3Config(
            hidden_size=config.hidden_size,
            n_routed_experts=config.num_attention_heads - config.shared_heads,
            num_experts_per_tok=chosen,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            routed_scaling_factor=2.0,
        )
        super().__init__(self.sizes)


class DynamicHeadsForCausalLM(DeepseekV3ForCausalLM):
    """transformers' DeepSeek-V3 with a router in each attention. `policies.attention.attend` weighs the heads."""

    config: DynamicHeadsConfig
    config_class = DynamicHeadsConfig

    def __init__(self, config: DynamicHeadsConfig) -> None:
        super().__init__(config)
        self.config._attn_implementation = ATTENTION  # no other one weighs the attention heads
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(_choose, with_kwargs=True)
        self.fresh_routers()

    def fresh_routers(self) -> None:
        for layer in self.model.layers:
            layer.self_attn.gate = HeadRouter(self.config)
            self._init_weights(layer.self_attn.gate)


def head_weights(attention: nn.Module, hidden_BTD: Tensor) -> Tensor:
    """The weight of every attention head of a layer, [B, T, H]; 0 where it does not compute."""
    logits_NR, weights_Nk, heads_Nk = attention.gate(hidden_BTD)
    routed_NR = weights_Nk.new_zeros(logits_NR.shape).scatter(1, heads_Nk, weights_Nk)
    return F.pad(routed_NR, (attention.config.shared_heads, 0), value=1.0).view(*hidden_BTD.shape[:2], -1)


def _choose(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    if attention.config._attn_implementation != ATTENTION:
        raise PolicyError(f"attn_implementation={attention.config._attn_implementation!r} computes all attention heads")
    return args, kwargs | {"head_weights": head_weights(attention, kwargs["hidden_states"])}


def heads_config(config: PretrainedConfig, active: float, shared: int) -> DynamicHeadsConfig:
    """The configuration `config` with the share `active` of its heads. Raises PolicyError for numbers that make no
    choice, or that are not those of a policy that has routers.

    >>> heads_config(DeepseekV3Config(num_attention_heads=96, num_key_value_heads=96), 0.33, shared=2).active_heads
    32
    """
    if not isinstance(config, DeepseekV3Config):
        raise PolicyError(
            f"active_heads: a model of type {config.model_type!r} has attention of another kind; use a DeepSeek-V3 "
            "policy (quartet convert), or drop active_heads"
        )
    heads = config.num_attention_heads
    count = max(1, round(active * heads))
    if not shared < count <= heads or heads - shared < 2:
        raise PolicyError(
            f"active_heads: active={active} is {count} of {heads} heads, and with shared={shared} the router has no "
            f"choice; use active={min((shared + 1) / heads, 1):.2g} or more, and leave it two heads to choose from"
        )
    if not isinstance(config, DynamicHeadsConfig):
        fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        return DynamicHeadsConfig(**fields, active_heads=count, shared_heads=shared)
    if (config.active_heads, config.shared_heads) != (count, shared):
        raise PolicyError(
            f"active_heads: active={active} is {count} heads and shared={shared}, but this policy has learned with "
            f"{config.active_heads} and {config.shared_heads}; drop active_heads"
        )
    return config


def with_dynamic_heads(trunk: PreTrainedModel, active: float, shared: int, seed: int = 0) -> PreTrainedModel:
    """The trunk itself where it has such attention heads already, else a model of its own tensors and fresh routers,
    drawn from `seed`.

    Raises PolicyError as `heads_config` does, and for weights that are sharded, in 4 bits or with adapters.
    """
    config = heads_config(trunk.config, active, shared)
    if config is trunk.config:
        return trunk
    named = dict(trunk.named_parameters())
    if any(isinstance(p, DTensor) or is_held(p) or ".lora_" in name for name, p in named.items()):
        raise PolicyError(
            "active_heads: routers cannot be added to weights that are sharded, in 4 bits or with adapters; add them "
            "first, such as by `quartet sft` in one process, and name the saved policy as the model"
        )
    with torch.device("meta"):
        made = DynamicHeadsForCausalLM(config)
    made.load_state_dict(trunk.state_dict(), strict=False, assign=True)
    made.tie_weights()
    made.model.rotary_emb = trunk.model.rotary_emb
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made.fresh_routers()
    made.generation_config = trunk.generation_config
    return made.to(trunk.device).eval()


AutoConfig.register(DynamicHeadsConfig.model_type, DynamicHeadsConfig)
AutoModelForCausalLM.register(DynamicHeadsConfig, DynamicHeadsForCausalLM)
register_checkpoint_conversion_mapping(
    DynamicHeadsConfig.model_type, get_checkpoint_conversion_mapping(DeepseekV3Config.model_type) or []
)
