"""A tiny Qwen2 with random weights, a chat template with tools, and eight rows of data: what small programs run on."""

from __future__ import annotations

import json
from pathlib import Path


def write(folder: Path) -> None:
    """`folder`/model, `folder`/untemplated (the same without a chat template) and `folder`/data.jsonl."""
    import torch
    import trl
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from policies.presets import small_tokenizer

    template = (Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja").read_text()
    rows = [{"question": f"What is {n} plus 1?", "answer": str(n + 1), "secret": n + 1} for n in range(8)]
    tokenizer = small_tokenizer([template, *(row["question"] for row in rows)] * 3, 1024)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 8,  # Qwen's tokenizer class may add tokens of its own
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, given in (("untemplated", None), ("model", template)):
        tokenizer.chat_template = given
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
