"""Fields of a configuration that contradict each other, and checkpoints whose tensors contradict it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, DeepseekV3Config, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from policies.bounds import beyond, read_fields
from policies.files import gguf
from policies.files.packed import is_packed, unreadable
from policies.layout import (
    ADAPTER,
    FIXED_FIELDS,
    WAY_OUT,
    PolicyError,
    Shape,
    WeightFiles,
    auto_class,
    expert_views,
    find_file,
    rotations,
)
from policies.mtp import MTPHead
from policies.mtp_layers import head_state, may_idle, mtp_layers, router_name

MANY = 100_000  # tensors; DeepSeek-V3 has 46,000

# Relatives of DeepSeek-V3 by the beginning of their model_type, and why they cannot be a policy of ours.
REFUSED_TYPES = {
    "kimi_k2": (
        "its classes and its tokenizer are code in the model's repository, which is never run, and transformers "
        "has none. The architecture is DeepSeek-V3's: a folder with dequantised weights, model_type: deepseek_v3 in "
        "config.json and a tokenizer.json can be used (see docs/gpus/moonlight_tokenizer.py)"
    ),
    "deepseek_v32": (
        "its attention reads only what an indexer chooses (DeepSeek Sparse Attention), and our decoding path has no "
        "indexer; use DeepSeek-V3 or V3.1"
    ),
    "deepseek_v4": (
        "our decoding path computes neither its compressed sparse attention nor its hyper-connections; use DeepSeek-V3 "
        "or V3.1"
    ),
    "longcat": (
        "its layers hold two attention blocks and experts that compute nothing, which our decoding path does not know; "
        "use a DeepSeek-V3 checkpoint"
    ),
}
# What tells a layout that a maker's own programs read: a file beside the weights, or a field of config.json.
ORIGINAL_LAYOUTS = {"params.json": "Mistral", "inter_dim": "DeepSeek"}
POSITIVE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
)
COUNTS = ("qk_nope_head_dim", "num_nextn_predict_layers", "first_k_dense_replace")
ROUTING = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
ROUTER_FIELDS = (*ROUTING, "moe_intermediate_size", "n_shared_experts")


def why_refused(kind: str) -> str:
    """The reason for which a folder of this model_type cannot be a policy of ours; empty for the other types.

    >>> why_refused("llama")
    ''
    """
    return next((why for start, why in REFUSED_TYPES.items() if kind.startswith(start)), "")


def refuse_type(source: str | Path) -> None:
    """Raises PolicyError with the reason for a model_type that we refuse or that transformers does not know, and for
    numbers that no model has: transformers would begin to build it. An adapter without a model has no type."""
    try:
        file = find_file(str(source), "config.json")
        fields = read_fields(Path(file)) if file else {}
    except (UnicodeDecodeError, json.JSONDecodeError, OSError):
        return  # transformers will name what is wrong with the source or the file
    except ValueError as error:
        raise PolicyError(f"model={str(source)!r}: {error}; fetch it again") from error
    if faults := list(beyond(fields)):
        raise PolicyError(f"model={str(source)!r}: config.json is damaged or hostile: " + "; ".join(faults[:5]))
    kind = fields.get("model_type")
    if not isinstance(kind, str):
        for name, maker in ORIGINAL_LAYOUTS.items():
            if name in fields or find_file(str(source), name):
                raise PolicyError(
                    f"model={str(source)!r} is in {maker}'s own layout, by {name}, and transformers does not read its "
                    "weights: use the files that were published for transformers (config.json with a model_type, "
                    "model*.safetensors), mostly in the same repository"
                )
        refuse_adapter(source)
        return
    if why := why_refused(kind):
        raise PolicyError(f"model={str(source)!r} is of type {kind!r}: {why}")
    if kind not in CONFIG_MAPPING:
        raise PolicyError(
            f"model={str(source)!r} is of type {kind!r}, which transformers {transformers_version} does not know; code "
            "from a model's repository is never run: use a newer transformers, if it has this type, or another model"
        )


def refuse_adapter(source: str | Path) -> None:
    """Raises PolicyError for an adapter of peft. Call it for a source that has no safetensors."""
    file = find_file(str(source), ADAPTER)
    if file is None or gguf.file_of(source):  # a GGUF file is read alone, see `gguf.named`
        return
    try:
        base = read_fields(Path(file)).get("base_model_name_or_path")
    except (ValueError, OSError):  # a damaged file shows that this is an adapter, too
        base = None
    needed = f"the base model {base!r}" if base else "a base model, which the file does not name"
    raise PolicyError(
        f"model={str(source)!r} holds an adapter of peft ({ADAPTER}) and no model.safetensors. The adapter needs "
        f"{needed}: merge the two (merge_and_unload of peft) into another folder and use it, or use the base model"
    )


def contradictions(config: PretrainedConfig) -> Iterator[str]:
    """Yields one sentence for each fault: the field, its value, what it contradicts, and the way out.

    >>> list(contradictions(DeepseekV3Config(n_routed_experts=250)))
    ['n_routed_experts=250 is not a multiple of n_group=8; use one of 248, 256, or another n_group']
    """
    yield from _tokens_and_rope(config)
    if is_packed(config) and (fault := unreadable(config)):
        yield fault
    if not isinstance(config, DeepseekV3Config):
        return
    faults = [*_wrong_values(config), *_attention(config), *_dynamic_heads(config)]
    if not faults and config.first_k_dense_replace < config.num_hidden_layers:
        faults = list(_router(config))
    yield from faults
    if getattr(config, "quantization_config", None) is not None and not is_packed(config):
        method = dict(config.quantization_config).get("quant_method", "unnamed")
        yield f"quantization_config (method {method!r}): packed weights cannot be trained; use a dequantised copy"


def _tokens_and_rope(config: PretrainedConfig) -> Iterator[str]:
    size = getattr(config, "vocab_size", None) or 0
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, field, None)
        outside = [token for token in (value if isinstance(value, list) else [value]) if token and token >= size > 0]
        if outside:
            yield f"{field}={value} contradicts vocab_size={size}: ids run from 0 to {size - 1}"
    for kind in {rotation.get("rope_type", "default"): None for rotation in rotations(config)}:
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
            yield f"rope_parameters.rope_type={kind!r} is not one that transformers computes: {known}"


def _wrong_values(config: DeepseekV3Config) -> Iterator[str]:
    has_experts = (config.first_k_dense_replace or 0) < config.num_hidden_layers
    positive = POSITIVE_FIELDS + (ROUTER_FIELDS if has_experts else ())
    for field, least in (dict.fromkeys(positive, 1) | dict.fromkeys(COUNTS, 0)).items():
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
            f"MLA expands its latent for every attention head; use {heads}"
        )


def _dynamic_heads(config: DeepseekV3Config) -> Iterator[str]:
    """See heads.py."""
    heads, active = config.num_attention_heads, getattr(config, "active_heads", None)
    if active is None:
        return
    shared = config.shared_heads
    if not 0 <= shared < active <= heads or heads - shared < 2:
        yield (
            f"active_heads={active} and shared_heads={shared} of num_attention_heads={heads}: a router chooses "
            "active_heads - shared_heads, 1 or more, of the attention heads that are not shared, 2 or more"
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


def check_tensors(files: WeightFiles, config: DeepseekV3Config) -> None:
    """Raises PolicyError if tensors of a checkpoint are missing, not explained by its config, or of other shapes."""
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    layers = mtp_layers(config, files.shapes)
    stored = {name: shape for name, shape in files.shapes.items() if not _is_copy(config, name)}
    try:
        with torch.device("meta"):
            state = dict(auto_class(config).from_config(config).state_dict())
            for layer in range(first, first + depth if layers else first):
                idle = may_idle(config) and router_name(layer) in stored
                state |= head_state(config, MTPHead(config).state_dict(), layer, idle)
    except Exception as error:  # sizes that make no model fail in many places
        raise PolicyError(f"model={files.source!r}: config.json makes no model: {error!r}; {WAY_OUT}") from error
    if config.tie_word_embeddings and "lm_head.weight" not in stored:
        state.pop("lm_head.weight", None)
    names = sum(2 * len(tensor) if name.endswith("gate_up_proj") else 1 for name, tensor in state.items())
    if names > MANY + 10 * len(stored):  # their names alone would fill the memory
        what = f"config.json describes about {names:,} tensors, and the files hold {len(stored):,}"
        raise PolicyError(f"model={files.source!r}: {what}; {WAY_OUT}")
    expected: dict[str, Shape] = {}
    for name, tensor in state.items():
        views = [(name, tensor)] if name in stored else expert_views(name, tensor)
        expected |= {view_name: tuple(view.shape) for view_name, view in views}
    try:
        refuse_differences(files.source, expected, stored)
    except PolicyError as error:
        if layers and len(layers) != depth:
            raise PolicyError(
                f"{error}. num_nextn_predict_layers={depth} contradicts {len(layers)} stored MTP layers "
                f"(model.layers.{layers[0]} ...): set it to {len(layers)}, or remove their tensors"
            ) from error
        raise


def refuse_differences(source: str | Path, expected: Mapping[str, Shape], stored: Mapping[str, Shape]) -> None:
    """Raises PolicyError, which names tensors that are missing, misshapen or not expected."""

    def described(name: str) -> str:
        shapes = [list(shapes[name]) for shapes in (expected, stored) if name in shapes]
        if len(shapes) == 2:
            return f"{name} (expected {shapes[0]}, found {shapes[1]})"
        return f"{name} {shapes[0]}" if shapes[0] else name

    misshapen = {name for name in expected.keys() & stored.keys() if expected[name] != stored[name]}
    for kind, names in (
        ("lacks the tensors", expected.keys() - stored.keys()),
        ("has tensors of another shape:", misshapen),
        ("has tensors that its config does not explain:", stored.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(map(described, sorted(names)[:5]))
            raise PolicyError(f"model={str(source)!r} {kind} {shown} ({len(names)} in all); {WAY_OUT}")


def _is_copy(config: DeepseekV3Config, name: str) -> bool:
    """Released checkpoints repeat embedding and LM head in their MTP layers, old ones the rotary frequencies."""
    layer = re.match(r"model\.layers\.(\d+)\.(embed_tokens\.|shared_head\.head\.)", name)
    return bool(layer and int(layer[1]) >= config.num_hidden_layers) or name.endswith(".rotary_emb.inv_freq")


def refuse_larger(files: WeightFiles, config: PretrainedConfig) -> None:
    """Raises PolicyError for a configuration of a far larger model than the files hold: transformers would make up the
    rest before it tells what is missing."""
    stored = sum(math.prod(shape) for shape in files.shapes.values())
    trunk = _without_weights(config)
    if trunk is None:
        return
    described = sum(parameter.numel() for parameter in trunk.parameters())
    if stored and described > 4 * stored:
        what = f"config.json describes {described:,} parameters, and the files hold {stored:,}"
        raise PolicyError(f"model={files.source!r}: {what}; {WAY_OUT}")


def _without_weights(config: PretrainedConfig) -> PreTrainedModel | None:
    """The model that a configuration describes, on no device; None if transformers cannot make one, and will name what
    is wrong with the configuration when it loads it."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except Exception:  # whatever the code of a model raises for fields that do not fit together
        return None


def refuse_untied(source: str | Path, trunk: PreTrainedModel) -> None:
    """Raises PolicyError for a model that has an LM head of its own where its configuration says that it is the
    embedding. transformers keeps it, and a model made from the configuration has none."""
    lm_head, embedding = trunk.get_output_embeddings(), trunk.get_input_embeddings()
    tied = getattr(trunk.config, "tie_word_embeddings", False)
    if tied and lm_head is not None and lm_head.weight is not embedding.weight:
        raise _untied(source)


def _untied(source: str | Path) -> PolicyError:
    return PolicyError(
        f"model={str(source)!r}: tie_word_embeddings=True in config.json contradicts the files, which hold an LM "
        "head that differs from the embedding; set it to false, or remove the LM head's tensor"
    )


def _never_tied(source: str | Path, kind: str) -> PolicyError:
    return PolicyError(
        f"model={str(source)!r}: tie_word_embeddings=True in config.json, but transformers ties the LM head of no "
        f"model of type {kind!r}: set it to false"
    )


def check_lm_head(files: WeightFiles, config: PretrainedConfig) -> None:
    """Raises PolicyError for an LM head that is missing, or that the configuration says to be the embedding when it is
    not. Only a stored LM head that should be the embedding is read."""
    trunk = _without_weights(config)
    if trunk is None:
        return
    lm_head, embedding = trunk.get_output_embeddings(), trunk.get_input_embeddings()
    names = {module: f"{name}.weight" for name, module in trunk.named_modules()}
    if lm_head not in names or embedding not in names:
        return
    stored = names_in_files(files, trunk)
    ties = lm_head.weight is embedding.weight
    if not ties and getattr(config, "tie_word_embeddings", False):
        raise _never_tied(files.source, config.model_type)
    head, first = (stored.get(names[module], "") for module in (lm_head, embedding))
    if not head and not ties:
        refuse_differences(files.source, {names[lm_head]: ()}, {})
    if not ties or not head or not first or head == first:
        return
    if not torch.equal(files.read(head)[head], files.read(first)[first]):
        raise _untied(files.source)


def names_in_files(files: WeightFiles, trunk: PreTrainedModel) -> dict[str, str]:
    """The names of stored tensors by those that they have in the model, as transformers renames them."""
    transforms = get_model_conversion_mapping(trunk)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state, prefix = trunk.state_dict(), trunk.base_model_prefix
    names: dict[str, str] = {}
    for stored in sorted(files.shapes, key=dot_natural_key):  # a renaming may depend on what came before
        name, _ = rename_source_key(stored, renamings, converters, prefix, state)
        names[name] = stored
    return names


def check_report(source: str | Path, config: PretrainedConfig, report: dict) -> None:
    """Raises PolicyError, which names missing, misshapen and stray tensors. MTP layers, after the last, are ignored."""
    stray = set(report["unexpected_keys"])
    layers = tuple(f"model.layers.{layer}." for layer in mtp_layers(config, stray))
    stored: dict[str, Shape] = {name: () for name in stray if not name.startswith(layers)}
    expected: dict[str, Shape] = dict.fromkeys(report["missing_keys"], ())
    for name, stored_shape, shape in report["mismatched_keys"]:
        stored[name], expected[name] = tuple(stored_shape), tuple(shape)
    refuse_differences(source, expected, stored)
