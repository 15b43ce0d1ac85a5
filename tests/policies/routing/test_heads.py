"""active_heads: attention heads that a router chooses, in learner, engine, graphs, adapters and files alike."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dense_models import SHAPES, dense_model
from engine_cases import (
    PARAMS,
    PROMPTS,
    assert_learner_agrees,
    assert_lossless,
    assert_packed_as_alone,
    assert_stock_is_refused,
    states,
    taught,
)
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.cli.parse import main
from grpo.config.balance import BalanceOptions
from grpo.learner.batch import collate
from grpo.learner.likelihood import Likelihood
from grpo.learner.parallel import ONE_PROCESS
from grpo.learner.prepare import supervised
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms import balance
from grpo.learner.terms.term import Work, read_ends
from grpo.run import checkpoint
from grpo.run.stop import Stopped
from grpo.train import train
from policies.conversion.dense import convert_dense
from policies.policy import Policy, PolicyError
from policies.routing.heads import DynamicHeadsForCausalLM, head_weights, with_dynamic_heads
from policies.routing.routers import routers
from review.readers.run_folder import read_metrics
from rollout.decoding.engine import Engine

CPU = torch.device("cpu")
FOUR = {"num_attention_heads": 4, "num_key_value_heads": 4}
HEADS = {"active_heads": 0.5, "sft.steps": 0}  # of the two heads that a micro policy has


def with_heads(policy: Policy, active: float = 0.75, shared: int = 1) -> Policy:
    policy.choose_heads(active, shared, seed=3)
    with torch.no_grad():
        for router in routers(policy.trunk, "self_attn").values():
            router.weight.normal_(0.0, 0.5)
            router.e_score_correction_bias.normal_(0.0, 0.2)
    return policy


@pytest.fixture(scope="module")
def policy(random_policy) -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return taught(with_heads(random_policy(31, **FOUR)), 0.8, 20)


def by_hand(policy: Policy, hidden_ND: torch.Tensor, layer: int) -> torch.Tensor:
    """[N, H]: the weights of the heads, one token at a time, from the formula of heads.py."""
    router, heads = policy.trunk.model.layers[layer].self_attn.gate, policy.config.num_attention_heads
    shared, rows = policy.config.shared_heads, []
    for hidden in hidden_ND:
        scores = [1 / (1 + float(torch.exp(-(hidden @ row)))) for row in router.weight]
        wanted = [score + float(bias) for score, bias in zip(scores, router.e_score_correction_bias, strict=True)]
        chosen = sorted(range(heads - shared), key=lambda i: -wanted[i])[: policy.config.active_heads - shared]
        routed = [2 * scores[i] if i in chosen else 0.0 for i in range(heads - shared)]
        rows.append([1.0] * shared + routed)
    return torch.tensor(rows)


@pytest.mark.parametrize(("active", "shared"), [(0.5, 1), (0.75, 1), (0.5, 0), (0.75, 2)])
@torch.no_grad()
def test_the_weights_are_those_of_the_formula(random_policy, active, shared):
    policy = with_heads(random_policy(31, **FOUR), active, shared)
    hidden = torch.randn(1, 7, policy.config.hidden_size)
    given = head_weights(policy.trunk.model.layers[1].self_attn, hidden)
    torch.testing.assert_close(given[0], by_hand(policy, hidden[0], 1), rtol=1e-5, atol=1e-6)
    assert ((given > 0).sum(-1) == 4 * active).all()


@pytest.mark.slow
@torch.no_grad()
def test_attention_is_the_weighted_sum_of_the_heads_that_were_chosen(policy):
    """The output of one layer, from stock attention with one head's columns of `o_proj` at a time."""
    attention = policy.trunk.model.layers[0].self_attn
    hidden, width = torch.randn(1, 5, policy.config.hidden_size), policy.config.v_head_dim
    rope = policy.trunk.model.rotary_emb(hidden, torch.arange(5)[None])
    mask = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    stock = type(attention).forward
    parts, kept = [], attention.o_proj.weight.clone()
    for head in range(4):
        attention.o_proj.weight.zero_()
        attention.o_proj.weight[:, head * width : (head + 1) * width] = kept[:, head * width : (head + 1) * width]
        parts.append(stock(attention, hidden, rope, mask)[0])
    attention.o_proj.weight.copy_(kept)
    weights = by_hand(policy, hidden[0], 0)
    expected = sum(weights[None, :, head, None] * part for head, part in enumerate(parts))
    found = attention(hidden_states=hidden, position_embeddings=rope, attention_mask=mask)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_completions_are_those_of_rows_of_their_own(policy):
    assert_packed_as_alone(policy)


@pytest.mark.parametrize("shape", [{}, {"q_lora_rank": 24}, {"qk_nope_head_dim": 0}, {"rope_interleave": False}])
def test_contract_2_the_engine_says_what_the_learner_says(random_policy, shape):
    policy = with_heads(random_policy(5, **FOUR | shape))
    for draft_tokens in (0, 3):
        groups = Engine(policy).sample(PROMPTS[:4], replace(PARAMS, draft_tokens=draft_tokens))
        assert_learner_agrees(policy, groups, PARAMS.temperature)


def test_contract_3_drafts_change_no_token(policy):
    assert_lossless(Engine(policy), PROMPTS, PARAMS, depths=(1, 3))


def test_a_saved_policy_and_a_worker_choose_the_same(policy, tmp_path):
    policy.save(tmp_path / "p")
    loaded, worker = Policy.load(tmp_path / "p"), Policy.from_skeleton(policy.skeleton())
    worker.load_weights(policy.weights())
    for other in (loaded, worker):
        assert isinstance(other.trunk, DynamicHeadsForCausalLM)
        assert torch.equal(states(other, [3, 4, 5], [6]), states(policy, [3, 4, 5], [6]))
    config = json.loads((tmp_path / "p/config.json").read_text())
    assert (config["model_type"], config["active_heads"]) == ("deepseek_v3_dynamic_heads", 3)
    half = Policy.load(tmp_path / "p", torch.bfloat16)
    for part in ("mlp", "self_attn"):
        assert {router.weight.dtype for router in routers(half.trunk, part).values()} == {torch.float32}


def test_adapters_merge_to_what_the_learner_computes(random_policy):
    policy = with_heads(random_policy(31, **FOUR))
    policy.add_lora(2, 4.0, ["o_proj", "kv_b_proj", "head_router"])
    with torch.no_grad():
        for name, parameter in policy.trunk.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
    # Merged weights are rounded, and a router near a tie then chooses otherwise: the learner takes what was recorded.
    groups = Engine(policy.merged()).sample(PROMPTS[:3], replace(PARAMS, record_routing=True))
    assert_learner_agrees(policy, groups, PARAMS.temperature)
    mini = collate([PackedRow(PROMPTS[0].token_ids, [Sample(0, [3, 4, 5])])], CPU)
    policy.hidden(mini.token_ids, mini.position_ids, mini.segment).sum().backward()
    found = {name: p.grad for name, p in policy.trunk.named_parameters() if p.grad is not None and ".gate." in name}
    moved = [name for name, gradient in found.items() if gradient.abs().max() > 1e-4]
    assert len(moved) == 2 * policy.config.num_hidden_layers  # A and B of each layer
    assert all("self_attn" in name for name in moved)
    plain = random_policy(31, **FOUR)
    plain.add_lora(2, 4.0, ["o_proj"])
    with pytest.raises(PolicyError, match="sharded, in 4 bits or with adapters"):
        plain.choose_heads(0.5, 1)


def test_another_attention_than_ours_is_refused(policy, tmp_path):
    policy.save(tmp_path / "p")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model.model(ids).last_hidden_state[0], states(policy, [3], [4, 5]))
    model.config._attn_implementation = "eager"
    with pytest.raises(PolicyError, match="attn_implementation='eager' computes all attention heads"):
        model(ids)


def test_heads_are_balanced_and_counted_as_experts_are(policy):
    term = balance.term(policy, SimpleNamespace(balance=BalanceOptions(bias_rate=0.1, sequence_weight=1.0)))
    rows = [PackedRow([3, 4, 5], [Sample(0, [6, 7, 8, 9])])]
    mini, likelihood = collate(rows, CPU), Likelihood(policy, watchers=[term])
    work = Work(supervised(rows), likelihood, ONE_PROCESS, [term], iter, rows)
    before = [r.e_score_correction_bias.clone() for r in routers(policy.trunk, "self_attn").values()]
    term.before_update(work)
    loss = term.scalar(mini, likelihood.forward(mini), work)
    (experts, heads), (_, count) = term.loads, work.fixed["balance"]
    assert (count.chosen.sum(1) == 8).all()  # two routed heads for each of four tokens; the shared one is not counted
    metrics = read_ends([term.end([work])])
    sequence = metrics["loss/balance_sequence"] * len(experts.routers)
    sequence += metrics["loss/balance_heads_sequence"] * len(heads.routers)
    assert loss.item() == pytest.approx(sequence, rel=1e-5)
    assert metrics["heads/load_max"] >= 1.0 >= metrics["heads/load_min"]
    now = [r.e_score_correction_bias for r in routers(policy.trunk, "self_attn").values()]
    for was, bias, counts in zip(before, now, count.chosen, strict=True):
        torch.testing.assert_close(bias - was, 0.1 * torch.sign(counts.float().mean() - counts))
        bias.copy_(was)


@pytest.mark.slow
def test_contract_9_a_run_trains_stops_goes_on_and_its_policy_remembers(micro_config, tmp_path):
    given = HEADS | {"loss.beta": 0.1, "eval.limit": 4, "balance.bias_rate": 0.01}
    train(micro_config(tmp_path / "whole", **given))
    with pytest.raises(Stopped):
        train(micro_config(tmp_path / "run", **given), stop_after=2)
    train(micro_config(tmp_path / "run", **given), resume="auto")
    one, two = (checkpoint.load(tmp_path / f"{name}/checkpoints/step_000003").tensors for name in ("whole", "run"))
    assert any("self_attn.gate" in name for name in one["policy"])
    assert all(torch.equal(tensor, two["policy"][name]) for name, tensor in one["policy"].items())
    lines = [line for line in read_metrics(tmp_path / "run") if "reward/mean" in line]
    assert max(line["mismatch/logprob_abs_max"] for line in lines) < 1e-4
    assert all(line["heads/load_max"] >= 1 for line in lines)
    assert AutoConfig.from_pretrained(tmp_path / "run/policy").active_heads == 1
    assert main(["eval", str(tmp_path / "run"), "--eval.limit", "2", "--threads", "1"]) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"active_heads": 1.5}, "active_heads"),
        ({"rollout.backend": "vllm"}, "vLLM computes all attention heads"),
        ({"lora.rank": 2}, "adapters alone do not train them; add head_router"),
    ],
)
def test_what_cannot_be_is_refused_by_name(micro_config, tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        train(micro_config(tmp_path / "r", **HEADS | given))
    assert not (tmp_path / "r").exists()


def test_other_numbers_and_other_models_are_refused_by_name(policy, tmp_path):
    with pytest.raises(PolicyError, match="has learned with 3 and 1; drop active_heads"):
        policy.choose_heads(0.5, 1)
    policy.choose_heads(0.75, 1)
    with pytest.raises(PolicyError, match="has attention of another kind"):
        with_dynamic_heads(dense_model(), 0.5, 1)
    policy.save(tmp_path / "p")
    config = json.loads((tmp_path / "p/config.json").read_text())
    (tmp_path / "p/config.json").write_text(json.dumps(config | {"active_heads": 9}))
    with pytest.raises(PolicyError, match="active_heads=9 and shared_heads=1 of num_attention_heads=4"):
        Policy.load(tmp_path / "p")


def test_an_export_is_refused_by_name(micro_config, tmp_path, capsys):
    train(micro_config(tmp_path / "run", **HEADS | {"sft.steps": 1, "steps": 1}))
    for part in ("policy", "checkpoints/step_000001"):
        assert_stock_is_refused(str(tmp_path / "run" / part), tmp_path / "out", "dynamic heads (active_heads)", capsys)


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_converted_dense_model_can_choose_heads(random_policy, tmp_path, both_ways):
    """The learner, the engine, and the policy that is read again."""
    tokenizer = random_policy(1).tokenizer
    dense = dense_model(SHAPES["mha"], vocab_size=len(tokenizer), max_position_embeddings=256)
    policy = with_heads(Policy(convert_dense(dense), None, tokenizer), 0.5, 1)
    policy.attend_to_prompts("bidirectional" if both_ways else "causal")
    params = replace(PARAMS, temperature=0.1, max_completion_tokens=24, stop_token_ids=(0,))
    plain = Engine(policy).sample(PROMPTS, params)
    assert_learner_agrees(policy, plain, params.temperature)
    policy.save(tmp_path / "p")
    assert torch.equal(states(Policy.load(tmp_path / "p"), [3, 4], [5, 6]), states(policy, [3, 4], [5, 6]))
