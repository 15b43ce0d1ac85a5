"""Tiny policies that run anywhere, with random weights and a small tokenizer learned from the text they will read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from policies.mtp import MTPHead
from policies.policy import Policy

PRESETS: dict[str, dict] = {
    # 1 dense + 3 MoE layers: 8 routed experts, 2 chosen, 1 shared.
    "tiny": {
        "hidden_size": 192,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,  # MLA expands its latent for every attention head
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "kv_lora_rank": 48,
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
    },
}
VOCABULARY = 640  # enough to make every word and number of the word problems one token


def small_tokenizer(corpus: Iterable[str], vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from `corpus`. A number up to 999 is one piece, and one token if it is frequent."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]?\d{1,3}|\n|[^\S\n]?[^\s\d]+|[^\S\n]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def build(preset: str, corpus: Iterable[str], seed: int = 0) -> Policy:
    """A fresh policy. The tokenizer learns from `corpus`, text of the kind it will read; `seed` fixes the weights."""
    tokenizer = small_tokenizer(corpus)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_mtp_layers=1,
        **PRESETS[preset],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = DeepseekV3ForCausalLM(config)
        mtp = MTPHead(config)
    trunk.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return Policy(trunk, mtp, tokenizer)
