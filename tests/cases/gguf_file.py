"""A small Llama with a byte-level tokenizer, written as llama.cpp's converter writes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize
from transformers import LlamaConfig, LlamaForCausalLM

from policies.presets import small_tokenizer

TEXTS = ["2 + 3 = 5\n", "how many apples are left?\n"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def begun(file: Path, architecture: str, config: Any) -> gguf.GGUFWriter:
    """A writer that knows the sizes."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    return writer


def end(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(file: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> LlamaForCausalLM:
    """Write `file`, with matrices of `kind`, and give the model that it was made from, which stays in float32."""
    tokenizer = small_tokenizer(TEXTS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=2.0**-16,  # GGUF keeps the nearest float32
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    writer = begun(file, "llama", config)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([kinds[token in special] for token in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        layer, _, rest = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        inner = name.startswith("model.layers.")
        part = NAMES[rest if inner else name.removesuffix(".weight")]
        if part in heads:  # llama.cpp rotates pairs that are neighbours, transformers halves
            tensor = tensor.view(heads[part], 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        data = tensor.contiguous().numpy()
        stored = quantize(data, kind) if tensor.dim() == 2 else data
        writer.add_tensor(
            f"blk.{layer}.{part}.weight" if inner else f"{part}.weight",
            stored,
            raw_dtype=kind if tensor.dim() == 2 else None,
        )
    end(writer)
    return model
