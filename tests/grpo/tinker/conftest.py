"""A small dense policy that is served, and datums as Tinker's SDK sends them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

tinker = pytest.importorskip("tinker", reason="the SDK of the extra tinker is not installed")

from grpo.tinker.service import Service  # noqa: E402
from policies.policy import Policy  # noqa: E402


@pytest.fixture(scope="session")
def base(micro_policy: Callable[[int], Any]) -> Policy:
    """A Llama of two layers whose LM head is not its embedding. No test trains it: what is trained shares it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = micro_policy(0).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Policy(LlamaForCausalLM(config).eval(), None, tokenizer)


@pytest.fixture
def service(base: Policy, tmp_path: Path) -> Iterator[Service]:
    service = Service(base, "llama", tmp_path / "state", torch.float32)
    yield service
    service.close()
