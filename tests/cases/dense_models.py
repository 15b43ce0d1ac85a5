"""Small dense models of every shape that can be converted."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, MAX_POSITIONS, VOCABULARY = 96, 64, 101

# (query heads, KV heads, head_dim, hidden)
SHAPES = {
    "mha": (4, 4, 8, 32),
    "gqa": (6, 2, 8, 48),
    "gqa_of_three": (9, 3, 16, 144),
    "mqa": (4, 1, 16, 64),
    "head_dim_apart_from_hidden": (4, 2, 24, 32),
    "smallest": (2, 1, 2, 8),
}


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    },
    "yarn": {**{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}, **{"original_max_position_embeddings": 16}},
}


def settings(shape: tuple[int, int, int, int] = SHAPES["gqa"], **changes: object) -> dict:
    """Large weights make sharp attention; LENGTH > MAX_POSITIONS crosses longrope's switch of factors."""
    heads, groups, head_dim, hidden = shape
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
    } | changes


def dense_model(shape: tuple[int, int, int, int] = SHAPES["gqa"], **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings(shape, **changes))).eval()
    with torch.no_grad():  # norms of one would hide a norm that is lost or swapped
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def random_ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
