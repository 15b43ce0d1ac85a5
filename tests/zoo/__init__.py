"""A tiny model of every causal type of transformers, built on the fly, in which no weight is neutral.

`kinds()` lists the types, `tiny(kind)` builds one, with every kind of layer that its architecture has, and
`policy(kind)` loads one from its folder. Its matrices are wide and its norms, biases, sinks and decays are random, so
that a layer left out, a mask or a state that is wrong show in its log-probabilities. `refused()` says why the other
types are not here.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from policies.cut import DEPTHS, quiet, randomize
from policies.policy import Policy
from policies.presets import small_tokenizer
from rewards.data.word_problems import word_problems

TABLE = json.loads((Path(__file__).parent / "exceptions.json").read_text())
VOCABULARY = 272  # the least that holds all bytes, special tokens and a few words
MOST_LAYERS = 4

SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    64: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim embd_dim word_embed_proj_dim lru_width "
    "input_embedding_size output_embedding_size",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size dim_ff dff d_inner intermediate_size_mlp decoder_ffn_dim "
    "dense_intermediate_size prefix_dense_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads "
    "attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads zero_expert_num",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok n_group "
    "num_experts_per_token moe_topk moe_k num_expert_group n_groups mamba_n_groups mamba_ngroups "
    "num_query_groups top_k_experts",
    16: "head_dim dim_head d_head kv_channels qk_nope_head_dim v_head_dim kv_lora_rank linear_head_dim index_head_dim "
    "index_n_heads linear_value_head_dim mamba_d_head mamba_head_dim attention_head_size swa_head_dim global_head_dim "
    "hidden_size_per_layer_input laurel_rank index_topk mamba_dt_rank swa_v_head_dim",
    24: "q_lora_rank",
    8: "qk_rope_head_dim linear_key_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads "
    "n_routed_experts num_experts num_local_experts moe_num_experts time_step_rank rotary_dim "
    # windows, blocks and chunks: the longer prompts of a test are longer
    "sliding_window sliding_window_size attention_chunk_size chunk_size mamba_chunk_size block_size window_size "
    "attention_window_size local_attention index_block_size adapter_rank rel_extent loop_gate_rank",
    1: "topk_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts moe_num_shared_experts",
    256: "max_position_embeddings n_positions max_seq_len n_ctx context_length",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
MULTIPLIERS = {  # 1 by default, and another number in models that people use
    "logits_scaling": 2.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "lm_head_multiplier": 0.5,
    "routed_scaling_factor": 1.5,
    "logit_scale": 0.5,
}
TOKENS = {"bos_token_id": 2, "eos_token_id": 0, "pad_token_id": 1, "is_decoder": True, "use_cache": True}


def kinds() -> list[str]:
    """The types of which a tiny model can be built, as transformers calls them."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in TABLE["refused"]]


def refused() -> dict[str, str]:
    """The other types of transformers, with the reason."""
    return dict(TABLE["refused"])


def variants() -> list[str]:
    """Other forms of some types, `kind/form`: with experts, without a window, below the count that an indexer picks."""
    return list(TABLE["variants"])


def tiny_config(kind: str, layers: int | None = None, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model. `layers`: how many of them, by default one of each kind. `changes`: fields of
    the language model that shall have other values."""
    own = TABLE["fields"].get(kind.partition("/")[0], {}) | TABLE["variants"].get(kind, {}) | changes
    form = CONFIG_MAPPING[kind.partition("/")[0]]
    with quiet():
        if "text_config" not in form.sub_configs:
            return _small(form, layers, own)
        usual = form()
        fields = {"text_config": _small(type(usual.text_config), layers, own).to_dict()}
        for name in form.sub_configs.keys() - {"text_config"}:  # towers for pictures and sound
            if getattr(usual, name) is not None:
                fields[name] = _small(
                    type(getattr(usual, name)), 1, TABLE["parts"].get(kind, {}).get(name, {})
                ).to_dict()
        whole = {name: changes[name] for name in ("tie_word_embeddings",) if name in changes}
        return form(**fields | whole)


def _small(form: type[PretrainedConfig], layers: int | None, own: dict[str, Any]) -> PretrainedConfig:
    usual = form().to_dict()
    small = {name: value for name, value in (SMALL | MULTIPLIERS).items() if usual.get(name) is not None}
    small |= {name: value for name, value in TOKENS.items() if name in usual}
    if "kv_lora_rank" in usual and "num_key_value_heads" in usual:
        small["num_key_value_heads"] = small["num_attention_heads"]  # every head of multi-head latent attention is one
    if "qk_rope_head_dim" in usual:
        small.pop("head_dim", None)  # it is the same
    if layers is not None:
        own = {name: value[:layers] if _is_per_layer(value, own) else value for name, value in own.items()}
        own = {name: value for name, value in own.items() if name not in DEPTHS}
    return form(**small | _one_of_each(usual, layers) | own)


def _is_per_layer(value: Any, own: dict[str, Any]) -> bool:
    return isinstance(value, list) and len(value) == own.get("num_hidden_layers", 2)


def _one_of_each(usual: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The lists with an entry per layer, cut to one layer of each kind."""
    counts = [name for name in DEPTHS if name in usual]
    depth = next((usual[name] for name in counts if isinstance(usual[name], int)), 0)
    lists = {name: value for name, value in usual.items() if isinstance(value, list) and len(value) == depth}
    lists = {name: value for name, value in lists.items() if value != list(range(len(value)))}
    forms = list(zip(*lists.values(), strict=True)) or [()] * depth
    firsts = sorted({form: place for place, form in reversed(list(enumerate(forms)))}.values())
    wanted = layers or max(2, min(len(firsts), MOST_LAYERS))
    places = (firsts + [place for place in range(len(forms)) if place not in firsts])[:wanted]
    cut = {name: [value[place] for place in sorted(places)] for name, value in lists.items()}
    return dict.fromkeys(counts, wanted) | cut


def tiny(kind: str, layers: int | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of this type with random weights in float32, always the same ones."""
    config = tiny_config(kind, layers, **changes)
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model


def folder(where: str | Path, kind: str, layers: int | None = None, seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny model as models are published: config.json, safetensors and a tokenizer of word problems that has
    as many tokens as the model."""
    with quiet():
        tiny(kind, layers, seed, **changes).save_pretrained(where)
    tokenizer().save_pretrained(where)
    return Path(where)


def policy(kind: str, layers: int | None = None, seed: int = 0, **changes: Any) -> Policy:
    """A tiny model, loaded from a folder as users do. Raises PolicyError for a type whose folders are refused."""
    with tempfile.TemporaryDirectory() as where:
        return Policy.load(folder(where, kind, layers, seed, **changes))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    problems = word_problems("train", [1], count=50)
    return small_tokenizer([f"{row['question']}\n{row['answer']}\n" for row in problems], VOCABULARY)
