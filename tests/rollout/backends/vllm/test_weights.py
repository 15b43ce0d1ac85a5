"""What vLLM is sent is what a saved checkpoint holds: every tensor, by name and to the bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from policies.policy import Policy
from policies.presets import small_tokenizer
from rollout.backends.vllm.weights import ALIGNMENT, described, first_difference, in_checkpoint_layout, length, stream

CASES = {
    "mtp": {},
    "no head": {"mtp": False},
    "latent queries, groups": {"q_lora_rank": 10, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "dense and tied": {"first_k_dense_replace": 2, "tie_word_embeddings": True, "mtp": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_that_of_a_saved_checkpoint(random_policy, tmp_path, case):
    policy = random_policy(3, **CASES[case])
    policy.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    sent = in_checkpoint_layout(policy, policy.publication())
    assert sent.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())


def test_the_experts_of_another_model_are_named_one_by_one(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 48}
    trunk = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=2, **sizes, **experts)).eval()
    policy = Policy(trunk, None, small_tokenizer(["two and three"]))
    trunk.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sent = in_checkpoint_layout(policy, policy.publication())
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in sent
    assert sent.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())


def test_adapters_are_merged(random_policy):
    policy = random_policy(3)
    before = in_checkpoint_layout(policy, policy.publication())
    before = {name: tensor.clone() for name, tensor in before.items()}
    policy.add_lora(2, 4.0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    sent = in_checkpoint_layout(policy, policy.publication())
    assert sent.keys() == before.keys()
    changed = {name for name, tensor in sent.items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in changed} >= {"o_proj", "gate_proj", "down_proj"}


def test_bytes_are_aligned_and_counted():
    tensors = {"a": torch.arange(3, dtype=torch.bfloat16), "b": torch.ones(2, 5), "c": torch.zeros(0)}
    parts = b"".join(stream(tensors))
    assert len(parts) == length(tensors) == 2 * ALIGNMENT
    assert described(tensors) == [["a", "bfloat16", [3]], ["b", "float32", [2, 5]], ["c", "float32", [0]]]
    assert torch.equal(
        torch.frombuffer(bytearray(parts[ALIGNMENT : ALIGNMENT + 40]), dtype=torch.float32), torch.ones(10)
    )


def test_the_first_tensor_that_differs_is_named(random_policy):
    tensors = in_checkpoint_layout(policy := random_policy(1), policy.publication())
    assert first_difference(tensors, {}) == next(iter(tensors))
