"""Counts against models that exist: their parameters, the FLOPs of their forwards, their caches."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, LlamaConfig, LlamaForCausalLM

from policies.anatomy import anatomy
from policies.decoding import latent_cache
from policies.decoding.absorbed import AbsorbedTrunk
from policies.decoding.kernels import plain_attention
from policies.policy import Policy
from rollout.backends.hf import HFTrunk

CONFIGS = {
    "plain": {},
    "dense": {"first_k_dense_replace": 2},
    "query_latent": {"q_lora_rank": 10},
    "wide_latent": {"kv_lora_rank": 100},  # too wide to fold W_uk and W_uv
    "narrow_latents": {"kv_lora_rank": 4, "q_lora_rank": 6},
    "rotary_keys_only": {"qk_nope_head_dim": 0},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "fine_grained": {
        "n_routed_experts": 32,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 8,
    },
}
LORA = {"lora_rank": 2, "lora_alpha": 4.0}


@pytest.fixture(params=CONFIGS)
def policy(request, random_policy):
    policy = random_policy(3, **CONFIGS[request.param])
    policy.config._experts_implementation = policy.config._attn_implementation = "eager"  # only these count exactly
    return policy


def flops(function) -> int:
    def grouped(a_shape, b_shape, *_, out_shape=None, **__) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[2]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
    with torch.no_grad(), counter:
        function()
    return counter.get_total_flops()


def test_parameters_are_those_of_the_model(policy):
    counted = anatomy(policy.config, 3, context=8, **LORA)
    assert counted.parameters == sum(p.numel() for p in policy.trunk.parameters())
    assert counted.mtp_parameters == 3 * sum(p.numel() for p in policy.mtp.parameters())
    policy.add_lora(rank=2, alpha=4.0)
    lora = sum(p.numel() for p in policy.trunk.parameters() if p.requires_grad)
    assert counted.lora_parameters == lora
    assert counted.lora_share == lora / counted.parameters


def test_prefill_flops_are_those_of_the_stock_forward(policy):
    counted = anatomy(policy.config, 1, context=1, **LORA).prefill_flops
    assert flops(lambda: policy.trunk.model(torch.tensor([[3]]), use_cache=False)) == counted


@pytest.mark.parametrize("context", [1, 7])
def test_decode_flops_are_those_of_the_absorbed_forward(policy, context, monkeypatch):
    monkeypatch.setattr(latent_cache, "attention", plain_attention)  # the fused kernel is not counted
    trunk = AbsorbedTrunk(policy.trunk, torch.float32, 64)
    cache = trunk.cache(1, context + 1)  # a longer one is attended to in steps of sixteen
    prompt = torch.arange(context)[None]
    with torch.no_grad():
        trunk(prompt, prompt, cache)
    cache.advance(context)
    token, position = torch.tensor([[5]]), torch.tensor([[context]])
    measured = flops(lambda: trunk.logits(trunk(token, position, cache)))
    assert measured == anatomy(policy.config, 1, context=context, **LORA).decode_flops


@pytest.mark.slow
def test_deepseek_v3_has_its_published_size():
    """DeepSeek-V3 report, section 4.2: 671B parameters, of which 37B are activated for each token."""
    counted = anatomy(DeepseekV3Config(), 1, context=4096, lora_rank=16, lora_alpha=32.0)
    assert round(counted.parameters / 1e9) == 671
    assert counted.active_parameters / 1e9 == pytest.approx(37, abs=0.6)
    assert counted.cache_numbers == 61 * 576
    assert (counted.experts.routed, counted.experts.per_token, counted.experts.layers) == (256, 8, 58)
    assert counted.lora_share < 0.03
    assert counted.lora_rank_within_aim == int(16 * 0.03 / counted.lora_share)


SMALL: dict[str, Any] = {
    **{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4},
    "attn_implementation": "eager",
}


def test_a_dense_model_is_counted_too():
    config = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    counted = anatomy(config, 0, context=1, **LORA)
    assert counted.parameters == counted.active_parameters == sum(p.numel() for p in model.parameters())
    assert counted.experts is None
    assert flops(lambda: model.model(torch.tensor([[3]]), use_cache=False)) == counted.prefill_flops
    cache = model(torch.tensor([[3]]), use_cache=True).past_key_values
    assert counted.cache_numbers == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert flops(lambda: model(torch.tensor([[4]]), past_key_values=cache)) == counted.decode_flops


def test_the_cache_of_mla_of_other_types_is_what_it_keeps():
    """Their `head_dim` is that of the rotated part, and our cache holds keys and values expanded."""
    config = DeepseekV2Config(
        **SMALL,
        num_key_value_heads=4,
        kv_lora_rank=12,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=2,
    )
    model = DeepseekV2ForCausalLM(config).eval()
    counted = anatomy(config, 0, context=1, **LORA)
    assert flops(lambda: model.model(torch.tensor([[3]]), use_cache=False)) == counted.prefill_flops
    trunk = HFTrunk(Policy(model, None, None), torch.float32)
    cache = trunk.cache(1, 3)
    with torch.no_grad():
        trunk(torch.tensor([[3, 4, 5]]), torch.arange(3)[None], cache)
    assert counted.cache_numbers == sum(entries.numel() for entries in cache.layers.values()) / 3


def test_layers_that_do_not_attend_fully_are_not_counted_as_if_they_did():
    config = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)
    config.layer_types = ["sliding_attention", "full_attention"]
    counted = anatomy(config, 0, context=8, **LORA)
    assert counted.cache_numbers is counted.prefill_flops is counted.decode_flops is None


def test_a_context_of_nothing_is_refused():
    with pytest.raises(ValueError, match="context=0"):
        anatomy(DeepseekV3Config(), 0, context=0, **LORA)
