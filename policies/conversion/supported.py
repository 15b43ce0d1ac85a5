"""Which dense checkpoints can be converted to DeepSeek-V3 exactly, and why the others cannot."""

from __future__ import annotations

from transformers import PreTrainedConfig

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FAMILIES = ("llama", "mistral")
REFUSED_FAMILIES = {
    "qwen2": "its q_proj, k_proj and v_proj have biases, and MLA's query has none",
    "qwen3": "it normalises each query and key head (q_norm, k_norm), and MLA does not",
    "smollm3": "some of its layers have no rotary embedding, and MLA rotates in every layer",
    "deepseek_v3": "it is MLA already",
}


class UnsupportedCheckpoint(ValueError):
    """The checkpoint cannot be converted exactly. The message names the field, its value, why, and what would work.

    >>> str(UnsupportedCheckpoint("mlp_bias", True, "the feed-forward has no biases", "use False"))
    'mlp_bias=True cannot be carried over exactly: the feed-forward has no biases; use False'
    """

    def __init__(self, field: str, value: object, why: str, way_out: str) -> None:
        super().__init__(f"{field}={value!r} cannot be carried over exactly: {why}; {way_out}")


def check_convertible(config: PreTrainedConfig) -> None:
    """Raises `UnsupportedCheckpoint` unless `convert_dense` is exact for this configuration."""

    def need(accepted: bool, field: str, value: object, why: str, way_out: str) -> None:
        if not accepted:
            raise UnsupportedCheckpoint(field, value, why, way_out)

    family, families = config.model_type, " or ".join(FAMILIES)
    why = REFUSED_FAMILIES.get(family, "its forward pass is not the one of Llama")
    need(family in FAMILIES, "model_type", family, why, f"use a checkpoint of type {families}")

    packed = getattr(config, "quantization_config", None)
    why = "packed weights cannot be rearranged"
    need(packed is None, "quantization_config", packed, why, "convert a dequantised copy")

    for field in ("attention_bias", "mlp_bias"):
        bias = getattr(config, field, False)
        need(not bias, field, bias, "DeepSeek-V3 has no bias there", "use a checkpoint without these biases")

    act = config.hidden_act
    need(act == "silu", "hidden_act", act, "our decoding path computes SwiGLU", "use hidden_act='silu'")

    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    way_out = f"None, or at least max_position_embeddings={longest} so that it never acts, would work"
    need((window or longest) >= longest, "sliding_window", window, "DeepSeek attends to all tokens", way_out)

    heads, groups, head_dim = dense_shape(config)
    why = f"num_attention_heads={heads} is not a multiple of it"
    need(heads % groups == 0, "num_key_value_heads", groups, why, "use a divisor")
    need(head_dim % 2 == 0, "head_dim", head_dim, "rotary dimensions come in pairs", "use an even head_dim")

    # Any fixed list of frequencies can be converted, and so can a fixed factor on cos and sin.
    rope = config.rope_parameters
    kind, share = rope.get("rope_type", rope), rope.get("partial_rotary_factor") or 1.0
    fixed = kind in STATIC_ROPE_TYPES or (kind == "longrope" and rope["short_factor"] == rope["long_factor"])
    why, static = "its frequencies change with the length of the text", ", ".join(STATIC_ROPE_TYPES)
    need(fixed, "rope_parameters.rope_type", kind, why, f"{static} would work, and longrope with equal factors")
    why = "every dimension of a key must rotate"
    need(share == 1.0, "rope_parameters.partial_rotary_factor", share, why, "1.0 would work")


def dense_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(query heads, KV groups, head dimension)"""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, config.num_key_value_heads, head_dim
