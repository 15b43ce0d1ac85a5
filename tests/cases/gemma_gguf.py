"""A small Gemma 3, written as llama.cpp's converter writes one: norms one higher, and a vocabulary with scores."""

from __future__ import annotations

from pathlib import Path

import gguf
import zoo
from transformers import PreTrainedModel

from tests.cases.gguf_file import NAMES as LLAMA
from tests.cases.gguf_file import begun, end

NAMES = LLAMA | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TEXT = ["▁", *"0123456789+=?", "▁=", "▁+"]


def write_gemma_gguf(file: Path) -> PreTrainedModel:
    """Write `file`, and give the model that it was made from: six layers, the last of full attention, and a window."""
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + TEXT
    kinds = gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.NORMAL
    model = zoo.tiny(
        "gemma3_text",
        vocab_size=len(tokens),
        num_hidden_layers=6,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        rms_norm_eps=2.0**-16,  # GGUF keeps the nearest float32
        query_pre_attn_scalar=256,  # a GGUF file has no field for it
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=5,
    )
    config = model.config
    writer = begun(file, "gemma3", config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    counts = len(SPECIAL), 256, len(TEXT)
    writer.add_token_types([kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(5)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    for name, tensor in model.state_dict().items():
        layer, _, rest = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        inner = name.startswith("model.layers.")
        part = NAMES[rest if inner else name.removesuffix(".weight")]
        if part != "output":  # it is the embedding
            data = (tensor + 1 if "norm" in part else tensor).contiguous().numpy()
            writer.add_tensor(f"blk.{layer}.{part}.weight" if inner else f"{part}.weight", data)
    end(writer)
    return model
