"""The parts of a policy and the cost of a token, counted from its configuration without loading a weight.

A multiply-add is two FLOPs, and only matrix products are counted. L layers, D hidden size, H heads, r = kv_lora_rank,
d_n, d_r = the unrotated and rotated part of a query, d_v of a value, S tokens to attend to.

    cache       an MLA layer keeps r + d_r numbers a token, one of grouped-query attention 2 · KV heads · head_dim; MLA
                of other types than DeepSeek-V3 is kept expanded, H · (d_n + d_r + d_v)
    prefill     2 · weights + 2 · L · H · S · (d_n + d_r + d_v): keys and values are expanded; without the LM head
    decode      2 · weights + 2 · L · H · S · (2r + d_r), absorbed: latents are attended as they are cached
                (DeepSeek-V2, section 2.1.2), r + d_r if d_n = 0; the weights are those of `AbsorbedBlock`, and the
                LM head is counted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import DeepseekV3Config, PretrainedConfig, PreTrainedTokenizerBase

from policies import lora
from policies.attention import sees_prompts_whole
from policies.layout import auto_class
from policies.mtp import MTPHead
from policies.policy import Policy, PolicyError

LORA_AIM = 0.03  # of the parameters
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token", "topk")


@dataclass(frozen=True)
class Experts:
    routed: int
    shared: int
    per_token: int
    groups: int
    groups_per_token: int
    width: int
    layers: int


@dataclass(frozen=True)
class Anatomy:
    """Parameters are numbers of weights, where tied ones count once. The `active` ones are those that one token uses:
    the whole embedding, and of the routed experts the share that is chosen. `cache_numbers` and FLOPs are per token
    over all layers, None if layers do not attend fully. `prefill_flops` is the mean over a prompt of `context` tokens,
    `decode_flops` is for the token after it. `lora_parameters` are the adapters of every default target, `lora_reach`
    is the share of the trunk's matrices that they are on, and `lora_left` says of the others why they are not."""

    model_type: str
    layers: int
    heads: int | None
    active_heads: int | None
    shared_heads: int
    prompt_attention: str
    parameters: int
    active_parameters: int
    mtp_depth: int
    mtp_parameters: int
    experts: Experts | None
    cache_numbers: int | None
    context: int
    prefill_flops: float | None
    decode_flops: float | None
    lora_rank: int
    lora_parameters: int
    lora_reach: float
    lora_left: dict[str, str]

    @property
    def lora_share(self) -> float:
        return self.lora_parameters / self.parameters

    @property
    def lora_rank_within_aim(self) -> int:
        """The largest rank whose adapters are at most 3 % of the parameters, or 0 if rank 1 has more."""
        return int(LORA_AIM * self.parameters * self.lora_rank / self.lora_parameters)


def anatomy(config: PretrainedConfig, mtp_depth: int, *, context: int, lora_rank: int, lora_alpha: float) -> Anatomy:
    """Counts on a model without storage. Raises ValueError if `context` < 1, PolicyError for a model that cannot
    be counted.

    >>> round(anatomy(DeepseekV3Config(), 1, context=4096, lora_rank=16, lora_alpha=32.0).parameters / 1e9)
    671
    """
    if context < 1:
        raise ValueError(f"context={context}: give the number of tokens that a token attends to, 1 or more")
    try:
        return _anatomy(config, mtp_depth, context, lora_rank, lora_alpha)
    except PolicyError:
        raise
    except Exception as error:
        if isinstance(config, DeepseekV3Config):
            raise
        words = f"{type(error).__name__}: {str(error)[:300]}"  # of transformers or peft, whose models are of many forms
        raise PolicyError(f"a model of type {config.model_type!r} cannot be counted: {words}") from error


def _anatomy(config: PretrainedConfig, mtp_depth: int, context: int, lora_rank: int, lora_alpha: float) -> Anatomy:
    text = config.get_text_config(decoder=True)  # of a model that reads pictures too, the part that writes
    with torch.device("meta"):
        trunk = auto_class(config).from_config(config)
        head = MTPHead(config) if mtp_depth and isinstance(config, DeepseekV3Config) else None
        total, active = count_parameters(trunk, text)
        mtp = mtp_depth * sum(p.numel() for p in head.parameters()) if head else 0
        cache = cache_numbers(text) if text is config else None
        prefill, decode = (None, None) if cache is None else _flops(trunk, config, context)
        experts = _experts(trunk, text)
        policy = Policy(trunk, head, cast(PreTrainedTokenizerBase, None))
        share, left = lora.reach(trunk)
        policy.add_lora(lora_rank, lora_alpha)
    return Anatomy(
        model_type=config.model_type,
        layers=text.num_hidden_layers,
        heads=(heads := getattr(text, "num_attention_heads", None)),
        active_heads=getattr(config, "active_heads", heads),
        shared_heads=getattr(config, "shared_heads", 0),
        prompt_attention="bidirectional" if sees_prompts_whole(config) else "causal",
        parameters=total,
        active_parameters=active,
        mtp_depth=mtp_depth,
        mtp_parameters=mtp,
        experts=experts,
        cache_numbers=cache,
        context=context,
        prefill_flops=prefill,
        decode_flops=decode,
        lora_rank=lora_rank,
        lora_parameters=sum(p.numel() for name, p in trunk.named_parameters() if ".lora_" in name),
        lora_reach=share,
        lora_left=left,
    )


def count_parameters(model: nn.Module, config: PretrainedConfig) -> tuple[int, int]:
    """(all, active) parameters of `model`. Of stacked experts (three axes) the chosen share is active."""
    total, active = 0, 0.0
    for name, parameter in model.named_parameters():
        stacked = parameter.dim() == 3 and ".experts." in name
        total += parameter.numel()
        active += parameter.numel() * (_experts_per_token(config) / len(parameter) if stacked else 1)
    return total, round(active)


def _experts_per_token(config: PretrainedConfig) -> int:
    names = [name for name in EXPERTS_PER_TOKEN if getattr(config, name, None)]
    if not names:
        raise PolicyError(
            f"a model of type {config.model_type!r} cannot be counted: its configuration says in none of "
            f"{', '.join(EXPERTS_PER_TOKEN)} how many experts a token uses"
        )
    return getattr(config, names[0])


def cache_numbers(config: PretrainedConfig) -> int | None:
    """The count of numbers that all layers keep for a token. Times 4 or 2 it is bytes in float32 or bfloat16.

    >>> cache_numbers(DeepseekV3Config())  # 61 · (512 + 64); keys and values of 128 attention heads: 57 times that
    35136
    """
    if isinstance(config, DeepseekV3Config):
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return None
    if not getattr(config, "num_attention_heads", None):  # it keeps a state in place of keys and values
        return None
    return config.num_hidden_layers * layer_numbers(config)


def layer_numbers(config: PretrainedConfig) -> int:
    """The count of numbers that a layer which attends keeps for a token, where it is not one of DeepSeek-V3.

    >>> from transformers import FalconConfig
    >>> layer_numbers(FalconConfig(hidden_size=64, num_attention_heads=4))  # its four heads share a key and a value
    32
    """
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        groups = 1
    return groups * sum(_widths(config))


def absorbed_weights(config: DeepseekV3Config) -> int:
    """Weights of one layer's absorbed attention that a token uses, folded as `AbsorbedBlock` folds them."""
    heads, rank, hidden = config.num_attention_heads, config.kv_lora_rank, config.hidden_size
    rope, nope, value = config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    width = hidden if config.q_lora_rank is None else config.q_lora_rank
    first = 0 if config.q_lora_rank is None else hidden * width
    folded_query = nope > 0 and rank * width <= 1.5 * nope * (width + rank)
    query = heads * width * (rank + rope) if folded_query else heads * (width * (nope + rope) + nope * rank)
    folded_out = rank * hidden <= 1.5 * value * (rank + hidden)
    out = heads * rank * hidden if folded_out else heads * value * (hidden + rank)
    return first + query + hidden * (rank + rope) + out


def _flops(trunk: nn.Module, config: PretrainedConfig, context: int) -> tuple[float, float]:
    """(prefill, decode) FLOPs per token."""
    embedding = trunk.get_input_embeddings().weight
    head = trunk.get_output_embeddings().weight
    vectors = sum(p.numel() for p in trunk.parameters() if p.dim() == 1)
    tied = head is embedding
    weights = count_parameters(trunk, config)[1] - vectors - embedding.numel() - (0 if tied else head.numel())
    layers, heads, mean = config.num_hidden_layers, config.num_attention_heads, (context + 1) / 2
    chosen = getattr(config, "active_heads", heads)  # attention of dynamic heads in decoding; prefill computes all
    if not isinstance(config, DeepseekV3Config):
        per_key = 2 * layers * heads * sum(_widths(config))
        return 2 * weights + per_key * mean, 2 * (weights + head.numel()) + per_key * (context + 1)
    expanded = 2 * layers * heads * (config.qk_head_dim + config.v_head_dim)
    scored = config.qk_rope_head_dim + (config.kv_lora_rank if config.qk_nope_head_dim else 0)
    latent = 2 * layers * chosen * (scored + config.kv_lora_rank)
    matrices = [(name, p) for name, p in trunk.named_parameters() if p.dim() > 1 and ".gate." not in name]
    attention = sum(p.numel() for name, p in matrices if ".self_attn." in name)
    absorbed = weights - attention + layers * absorbed_weights(config)
    return 2 * weights + expanded * mean, 2 * (absorbed + head.numel()) + latent * (context + 1)


def _experts(trunk: nn.Module, config: object) -> Experts | None:
    stacks = [name for name, p in trunk.named_parameters() if p.dim() == 3 and name.endswith(".experts.down_proj")]
    if not stacks:
        return None
    stack = trunk.get_parameter(stacks[0])
    groups = getattr(config, "n_group", None) or 1
    return Experts(
        routed=len(stack),
        shared=getattr(config, "n_shared_experts", None) or 0,
        per_token=_experts_per_token(config),
        groups=groups,
        groups_per_token=getattr(config, "topk_group", None) or groups,
        width=stack.shape[2],
        layers=len(stacks),
    )


def _widths(config: PretrainedConfig) -> tuple[int, int]:
    """How many numbers a key and a value have. In MLA `head_dim` is often that of the rotated part alone."""
    if getattr(config, "kv_lora_rank", None) and getattr(config, "v_head_dim", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim, head_dim
