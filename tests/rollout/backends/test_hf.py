"""Models that we did not write, in the same engine: their own numbers, whatever runs beside them."""

from dataclasses import replace

import pytest
import torch
from engine_cases import completions, tokens

from policies.attention import attending_by
from policies.paths import Paths
from policies.policy import Policy, PolicyError
from rollout.backends.hf import _attend
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams
from rollout.workers.kinds import PoolOptions, open_pool
from rollout.workers.local_pool import LocalPool

STOPS = tuple(range(7, 280, 15))
PROMPTS = [Prompt(f"p/{i}", "", [3 + i, *range(9, 8 + n)]) for i, n in enumerate((9, 1, 17, 4, 4, 30))]
PARAMS = SamplingParams(group_size=4, temperature=0.8, max_completion_tokens=18, stop_token_ids=STOPS, seed=5, step=2)
# As many KV heads as heads, one, and two; tied; biases; a norm on queries and keys; a head wider than its share;
# layers that slide within a window longer than any row; learned positions; parallel blocks; experts; sinks; caps;
# layers whose attention heads differ in number and width, and that read the keys of others; an indexer; linear
# attention, and state spaces beside attention and alone.
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
KINDS: dict[str, dict] = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 24},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64, "sliding_window_pattern": 2},
    "gpt2": {"n_positions": 256},
    "gpt_neox": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 16,
        "vocab_size_per_layer_input": 280,
        "hidden_size_per_layer_input": 8,
    },
    "deepseek_v32": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 6,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 64,
        "first_k_dense_replace": 3,
    },
    "qwen3_5_text": LINEAR | {"head_dim": 8, "num_hidden_layers": 4},
    "falcon_h1": {"head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8},
    "mamba": {"state_size": 8},
}
ESSENTIAL = ("llama", "qwen2", "qwen3")
# Windows that slide while both caches are in use; states beside the cache; sinks; a mask by ALiBi; no cache at all.
STOCK: dict[str, tuple[dict, Paths]] = {
    "qwen3_5_text": (KINDS["qwen3_5_text"], Paths("joined", "alone")),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16}, Paths("apart", "alone")),
    "gpt_oss": (
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        Paths("joined"),
    ),
    "bloom": ({}, Paths("joined", "alone")),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 256}, Paths("whole", "alone")),
}


@pytest.fixture(scope="module")
def stock(hf_policy):
    """`stock("bloom")`: a policy that transformers' own cache decodes."""

    def build(kind: str) -> Policy:
        config, paths = STOCK[kind]
        policy = hf_policy(kind, 3, **config)
        policy.paths = paths
        return policy

    return build


@torch.no_grad()
def differences(policy: Policy, groups: list[RolloutGroup], temperature: float) -> torch.Tensor:
    """|engine − model| of every sampled token's log-probability; the model reads one plain row at a time."""
    found = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor(completion.token_ids)
            row = torch.tensor([group.prompt.token_ids + completion.token_ids])
            with attending_by(policy.config, policy.own_attention):
                logits = policy.trunk(input_ids=row, use_cache=False).logits[0, len(group.prompt.token_ids) - 1 : -1]
            own = (logits.float() / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            found.append((own - torch.tensor(completion.logprobs)).abs())
    return torch.cat(found)


def bound(kind: str) -> float:
    """Of a log-probability. The states of Qwen3.5 pass rounding on from token to token: 1.1e-4 on a Xeon with AMX."""
    return 2e-4 if kind == "qwen3_5_text" else 1e-4


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("falcon_h1", "mamba"))) for kind in KINDS]
)
def test_contract_2_log_probabilities_are_the_models_own(hf_policy, kind):
    policy = hf_policy(kind, 3, **KINDS[kind])
    assert policy.backend == "transformers"
    groups = Engine(policy).sample(PROMPTS, PARAMS)
    apart = differences(policy, groups, PARAMS.temperature)
    assert apart.max() < bound(kind)
    assert apart.mean() < 1e-5
    lengths = {len(ids) for ids in tokens(groups)}
    assert len(lengths) > 4  # ragged, so that rows of several lengths and prompts were decoded together
    assert {c.finish_reason for c in completions(groups)} == {"stop", "length"}
    assert all(c.draft.target_forwards == len(c.token_ids) - 1 for c in completions(groups))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("bloom", "gpt_oss"))) for kind in STOCK]
)
def test_contracts_2_and_4_by_transformers_own_cache(stock, kind):
    """Rows that leave and come, with little room too, and alone."""
    policy = stock(kind)
    groups = Engine(policy).sample(PROMPTS, PARAMS)
    assert differences(policy, groups, PARAMS.temperature).max() < bound(kind)
    assert len({len(ids) for ids in tokens(groups)}) > 4
    assert tokens(Engine(policy, max_rows=8).sample(PROMPTS, PARAMS)) == tokens(groups)
    alone = [group for prompt in PROMPTS[:3] for group in Engine(policy).sample([prompt], PARAMS)]
    assert tokens(alone) == tokens(groups[:3])


@pytest.mark.parametrize(
    ("kind", "config", "sampler"),
    [
        *(("gemma3_text", {"head_dim": 8, "sliding_window": 16}, sampler) for sampler in ("joined", "apart", "whole")),
        ("qwen3_5_text", KINDS["qwen3_5_text"], "joined"),
        pytest.param("qwen3_5_text", KINDS["qwen3_5_text"], "whole", marks=pytest.mark.slow),
    ],
)
def test_every_way_to_keep_what_was_read_gives_the_same_tokens(hf_policy, kind, config, sampler):
    policy = hf_policy(kind, 3, **config)
    expected = tokens(Engine(policy).sample(PROMPTS, PARAMS))
    policy.paths = Paths(sampler)
    assert tokens(Engine(policy).sample(PROMPTS, PARAMS)) == expected


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (*ESSENTIAL[1:], "gemma4_text", "qwen3_5_text", "falcon_h1", "mamba")
        ),
    ],
)
def test_contract_4_tokens_do_not_depend_on_what_runs_beside_them(hf_policy, kind):
    engine = Engine(hf_policy(kind, 4, **KINDS[kind]))
    together = tokens(engine.sample(PROMPTS, PARAMS))
    assert tokens([group for prompt in PROMPTS for group in engine.sample([prompt], PARAMS)]) == together
    backwards = engine.sample(PROMPTS[::-1], PARAMS)
    assert tokens(backwards[::-1]) == together
    few = [group.completions[:2] for group in engine.sample(PROMPTS, PARAMS)]
    assert [
        [c.token_ids for c in group.completions] for group in engine.sample(PROMPTS, replace(PARAMS, group_size=2))
    ] == [[c.token_ids for c in group] for group in few]
    assert tokens(engine.sample(PROMPTS, PARAMS.at(3))) != together
    # Room for two groups at a time: the others wait, and take the places of rows that ended.
    assert tokens(Engine(engine.policy, max_rows=8).sample(PROMPTS, PARAMS)) == together


def test_contract_5_adapters_arrive_merged_and_later_weights_replace_them(hf_policy):
    policy = hf_policy("qwen3", 7)
    plain = open_pool(policy).sample(PROMPTS, PARAMS)
    policy.add_lora(rank=2, alpha=4.0)
    pool = open_pool(policy)
    assert pool.sample(PROMPTS, PARAMS) == plain  # an adapter starts at zero
    with torch.no_grad():
        for name, parameter in policy.trunk.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    pool.sync_weights(policy.weights(), 1)
    groups = pool.sample(PROMPTS, PARAMS)
    assert tokens(groups) != tokens(plain)
    assert differences(policy, groups, PARAMS.temperature).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_samples_in_the_precision_it_was_asked_for(hf_policy, dtype):
    policy = hf_policy("llama", 8)
    pool = LocalPool(policy, PoolOptions(dtype=dtype))
    groups = pool.sample(PROMPTS, PARAMS)
    assert {p.dtype for p in pool.engine.policy.parameters()} == {dtype}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    apart = differences(policy, groups, PARAMS.temperature)
    assert apart.mean() < (1e-5 if dtype == torch.float32 else 0.1)
    assert dtype == torch.float32 or apart.mean() > 1e-4


def test_attention_that_is_more_than_attention_is_refused():
    row = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="Module adds position_bias to its scores, which rollouts cannot do"):
        _attend(torch.nn.Module(), row, row, row, None, position_bias=torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("kind", "config", "context"),
    [
        ("qwen2", {}, 256),
        ("qwen2", {"sliding_window": 64}, 256),  # not used unless use_sliding_window says so
        ("mistral", {"sliding_window": 64}, 256),  # which slides
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 256),
        ("glm_moe_dsa", {"index_topk": 64}, 64),  # beyond it an indexer leaves tokens out
    ],
)
def test_the_context_ends_where_something_would_be_computed_otherwise(hf_policy, kind, config, context):
    policy = hf_policy(kind, **config)
    assert policy.max_length == context
    prompt = Prompt("long", "", [5] * (context - 10))
    engine = Engine(policy)
    engine.check([prompt], replace(PARAMS, max_completion_tokens=10))
    with pytest.raises(RolloutError, match=f"it passes the context of {context}"):
        engine.check([prompt], replace(PARAMS, max_completion_tokens=11))


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("window", [5, 20, 64])
def test_a_window_slides_over_prompts_and_completions(hf_policy, window, group_size):
    policy = hf_policy("mistral", 3, sliding_window=window)
    params = replace(PARAMS, max_completion_tokens=34, stop_token_ids=(), group_size=group_size)
    groups = Engine(policy).sample(PROMPTS, params)
    assert max(len(g.prompt.token_ids) for g in groups) == 30
    assert differences(policy, groups, PARAMS.temperature).max() < 2e-5


def test_the_tokenizers_own_stop_token_comes_first(hf_policy):
    policy = hf_policy("llama")
    policy.trunk.generation_config.eos_token_id = [9, 0, 4]
    assert policy.stop_token_ids == [0, 9, 4]
    policy.trunk.generation_config.eos_token_id = None
    assert policy.stop_token_ids == [0]
    policy = Policy(policy.trunk, None, type(policy.tokenizer)(tokenizer_object=policy.tokenizer._tokenizer))
    with pytest.raises(PolicyError, match="names a stop token"):
        _ = policy.stop_token_ids
