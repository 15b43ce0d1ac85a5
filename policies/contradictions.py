"""Fields of a configuration that contradict each other, found before any weight is read; DeepSeek-V3's in full."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import DeepseekV3Config, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# What released configurations say of themselves, and what transformers' DeepseekV3 computes whatever they say.
# Every policy that we save says it too: without topk_method vLLM refuses the router's bias, without scoring_func it
# computes another router and does not say so.
FIXED_FIELDS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
POSITIVE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
)
ROUTING = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
ROUTER_FIELDS = (*ROUTING, "moe_intermediate_size", "n_shared_experts")


def contradictions(config: PretrainedConfig) -> Iterator[str]:
    """One sentence for each fault: the field, its value, what it contradicts, and the way out.

    >>> list(contradictions(DeepseekV3Config(n_routed_experts=250)))
    ['n_routed_experts=250 is not a multiple of n_group=8; use one of 248, 256, or another n_group']
    """
    yield from _tokens_and_rope(config)
    if not isinstance(config, DeepseekV3Config):
        return
    faults = [*_wrong_values(config), *_attention(config)]
    if not faults and config.first_k_dense_replace < config.num_hidden_layers:
        faults = list(_router(config))
    yield from faults
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unnamed")
        yield f"quantization_config (method {method!r}): packed weights cannot be trained; use a dequantised copy"


def _tokens_and_rope(config: PretrainedConfig) -> Iterator[str]:
    size = getattr(config, "vocab_size", None) or 0
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, field, None)
        outside = [token for token in (value if isinstance(value, list) else [value]) if token and token >= size > 0]
        if outside:
            yield f"{field}={value} contradicts vocab_size={size}: ids run from 0 to {size - 1}"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        yield f"rope_parameters.rope_type={kind!r} is none of those that transformers computes: {known}"


def _wrong_values(config: DeepseekV3Config) -> Iterator[str]:
    has_experts = (config.first_k_dense_replace or 0) < config.num_hidden_layers
    for field in POSITIVE_FIELDS + (ROUTER_FIELDS if has_experts else ()):
        value = getattr(config, field)
        if value is None or value < 1:
            yield f"{field}={value!r} must be 1 or more"
    for field, least in (("qk_nope_head_dim", 0), ("num_nextn_predict_layers", 0), ("first_k_dense_replace", 0)):
        value = getattr(config, field)
        if value is None or value < least:
            yield f"{field}={value!r} must be {least} or more"
    if config.q_lora_rank is not None and config.q_lora_rank < 1:
        yield f"q_lora_rank={config.q_lora_rank} must be 1 or more, or null for queries without a latent"
    if config.rms_norm_eps <= 0:
        yield f"rms_norm_eps={config.rms_norm_eps} must be greater than 0"
    for field, expected in FIXED_FIELDS.items():
        value = getattr(config, field, expected)
        if value != expected:
            yield f"{field}={value!r}: the DeepseekV3 of transformers computes {expected!r} only; use such a model"
    if config.hidden_act != "silu":
        yield f"hidden_act={config.hidden_act!r}: our decoding path computes SwiGLU; use a checkpoint with 'silu'"


def _attention(config: DeepseekV3Config) -> Iterator[str]:
    rope, nope, heads = config.qk_rope_head_dim, config.qk_nope_head_dim, config.num_attention_heads
    if rope % 2:
        yield f"qk_rope_head_dim={rope} is odd, and rotary dimensions come in pairs; use an even number"
    if config.head_dim != rope:
        yield f"head_dim={config.head_dim} contradicts qk_rope_head_dim={rope}: here they are the same; drop head_dim"
    if config.qk_head_dim != nope + rope:
        yield (
            f"qk_head_dim={config.qk_head_dim} contradicts qk_nope_head_dim={nope} + qk_rope_head_dim={rope}; "
            "drop qk_head_dim"
        )
    if config.num_key_value_heads != heads:
        yield (
            f"num_key_value_heads={config.num_key_value_heads} contradicts num_attention_heads={heads}: "
            f"MLA expands its latent for every head; use {heads}"
        )


def _router(config: DeepseekV3Config) -> Iterator[str]:
    experts, groups, chosen, top_k = (getattr(config, field) for field in ROUTING)
    if experts % groups:
        near = sorted({experts - experts % groups, experts - experts % groups + groups} - {0})
        yield (
            f"n_routed_experts={experts} is not a multiple of n_group={groups}; "
            f"use one of {', '.join(map(str, near))}, or another n_group"
        )
        return
    size = experts // groups
    if size < 2:
        yield (
            f"n_group={groups} leaves {size} of n_routed_experts={experts} to an expert group, and a group's score is "
            f"the sum of its two best; use n_group={max(experts // 2, 1)} or less"
        )
    if chosen > groups:
        yield f"topk_group={chosen} contradicts n_group={groups}: there are no more groups; use {groups} or less"
    elif top_k > chosen * size:
        yield (
            f"num_experts_per_tok={top_k} contradicts topk_group={chosen}: {chosen} of n_group={groups} expert groups "
            f"hold {chosen * size} of n_routed_experts={experts}; use {chosen * size} or less"
        )
