"""What vLLM is sent is what a saved checkpoint holds: every tensor, by name and to the bit; or its adapters."""

import importlib
import json
import tempfile
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from policies.policy import Policy
from policies.presets import small_tokenizer
from rollout.vllm.process import SERVER
from rollout.vllm.weights import (
    Update,
    Updates,
    in_checkpoint_layout,
    stream,
)

CASES = {
    "mtp": {},
    "no head": {"mtp": False},
    "latent queries, groups": {"q_lora_rank": 10, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "dense and tied": {"first_k_dense_replace": 2, "tie_word_embeddings": True, "mtp": False},
}


def inside() -> ModuleType:
    """What vLLM's workers do with what they read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVER.parent))
        return importlib.import_module("quartet_tensors")


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_that_of_a_saved_checkpoint(random_policy, tmp_path, case):
    policy = random_policy(3, **CASES[case])
    policy.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    sent = in_checkpoint_layout(policy, policy.synced_weights())
    assert sent.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())


def qwen3_moe() -> Policy:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 48}
    trunk = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=2, **sizes, **experts)).eval()
    return Policy(trunk, None, small_tokenizer(["two and three"]))


def test_the_experts_of_another_model_are_named_one_by_one(tmp_path):
    policy = qwen3_moe()
    policy.trunk.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sent = in_checkpoint_layout(policy, policy.synced_weights())
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in sent
    assert sent.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())


CASES_WITH_ADAPTERS = {
    "linear": ({}, ["o_proj", "kv_b_proj", "gate_proj", "down_proj"]),
    "experts": ({}, ["o_proj", "experts"]),
    "head": ({"q_lora_rank": 10}, ["q_b_proj", "experts", "mtp"]),
    "dense head": ({"first_k_dense_replace": 2}, ["down_proj", "mtp"]),
    "router": ({}, ["router", "o_proj"]),
}


def learn(policy: Policy) -> None:
    """As an optimizer would: what is trained, and the expert bias of the trunk."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in policy.named_buffers():
            if "correction_bias" in name:
                buffer.add_(1e-3)


def travelled(update: Update) -> dict:
    """What a worker of vLLM reads of it, by its own code."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(stream(update.tensors)))
        file.flush()
        return inside().read(file.name, json.loads(json.dumps(update.header()))["tensors"])


def agree(policy: Policy, held: dict, update: Update, **limits: float) -> None:
    expected = in_checkpoint_layout(policy, policy.synced_weights())
    found = inside().merged(held, json.loads(json.dumps(update.header()))["adapters"])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name, **limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES_WITH_ADAPTERS)
def test_adapters_travel_as_a_and_b_and_are_merged_by_the_worker(random_policy, case, dtype):
    config, targets = CASES_WITH_ADAPTERS[case]
    policy = random_policy(3, **config).cast(dtype)
    policy.add_lora(2, 4.0, targets)
    updates, limits = Updates(policy, head=True), {"rtol": 0.0, "atol": 1e-6 if dtype == torch.float32 else 0.02}
    held: dict = {}
    for version in range(3):
        learn(policy)
        update = updates.next_update(policy.synced_weights())
        assert update.whole == (version == 0)
        held |= travelled(update)
        agree(policy, held, update, **limits)
    assert not updates.merged
    small = sum(tensor.nbytes for tensor in update.tensors.values())
    trained = sum(parameter.nbytes for parameter in policy.parameters() if parameter.requires_grad)
    biases = sum(buffer.nbytes for name, buffer in policy.named_buffers() if "correction_bias" in name)
    assert small <= trained + biases


def test_what_cannot_travel_as_a_and_b_travels_merged():
    """The layout of Qwen3-MoE has the experts one by one, and its conversion is transformers' own."""
    policy = qwen3_moe()
    policy.add_lora(2, 4.0, ["q_proj", "experts"])
    updates, held = Updates(policy, head=False), {}
    for _ in range(2):
        learn(policy)
        update = updates.next_update(policy.synced_weights())
        held |= travelled(update)
        agree(policy, held, update, rtol=0.0, atol=1e-6)
    assert not update.whole
    assert {name.split(".")[-2] for name in updates.merged} == {"experts"}
    assert {name.split(".")[-2] for name in update.adapters} == {"q_proj"}


def test_without_drafts_the_head_stays_at_home(random_policy):
    policy = random_policy(3)
    policy.add_lora(2, 4.0, ["o_proj", "mtp"])
    last = f"model.layers.{policy.config.num_hidden_layers}."
    for head in (True, False):
        update = Updates(policy, head=head).next_update(policy.synced_weights())
        assert any(name.startswith(last) for name in [*update.tensors, *update.adapters]) == head


def test_after_a_publication_that_failed_everything_travels(random_policy):
    policy = random_policy(3)
    policy.add_lora(2, 4.0, ["o_proj"])
    updates = Updates(policy, head=True)
    first, second = (updates.next_update(policy.synced_weights()) for _ in range(2))
    assert (second.whole, second.base) == (False, first.base)
    updates.forget()
    third = updates.next_update(policy.synced_weights())
    assert third.whole
    assert third.base != first.base


def test_what_no_loader_has_copied_is_seen():
    """Storage is what counts: parts, casts and other views are copies of the tensor; a shape alone is none."""
    tensors = {name: torch.ones(4, 2) for name in ("whole", "part", "cast", "meta", "passed over")}
    own = torch.zeros(4, 2)
    with inside().Copies() as copies:
        own.copy_(tensors["whole"])
        own[:1].copy_(tensors["part"].narrow(0, 2, 1))
        tensors["cast"].T.to(torch.bfloat16)
        torch.empty(4, 2, device="meta").copy_(tensors["meta"])
        tensors["passed over"].view(8)
    assert {name: copies.of(tensor) for name, tensor in tensors.items()} == {
        "whole": 8, "part": 2, "cast": 8, "meta": 0, "passed over": 0,
    }  # fmt: skip
