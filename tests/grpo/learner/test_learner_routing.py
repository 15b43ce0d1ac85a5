"""The learner with the sampler's experts: hand-made routings of prompts and completions, packed and split."""

import copy

import pytest
import torch
from small_learner import last_work, learner_of, term_of

from grpo.learner.learner import Learner
from grpo.train import train
from policies.routing.replay import RoutingReplay
from policies.routing.routers import RoutingRecorder, routers
from review.readers.run_folder import read_metrics
from rewards.group_score import GroupScore
from rollout.decoding.engine import Engine
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.sampling import SamplingParams

CPU = torch.device("cpu")
SCORES = [GroupScore([1.0, 0.0], {"exact": [1.0, 0.0]})]


def _learner(policy, replay=True, **given) -> Learner:
    return learner_of(policy, routing_replay=replay, **given)


def _padded(policy, ids, routing=None):
    """One plain causal row: log π of every token but the first, and the experts that were used [T, L, k]."""
    trunk, row = policy.trunk, torch.tensor([ids])
    with RoutingReplay([trunk], routing), RoutingRecorder(trunk) as recorder:
        logits = trunk(input_ids=row).logits[0, :-1]
    logprobs = logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
    return logprobs, torch.stack(recorder.experts, dim=1).view(len(ids), -1, 2)


def _sampled(sampler, prompt=(5, 6, 7), completions=((8, 9, 10, 0), (11, 12))) -> RolloutGroup:
    """Completions with the experts of `sampler`; the last token of each was never read, so it has none."""
    group = []
    for ids in completions:
        with torch.no_grad():
            logprobs, experts = _padded(sampler, [*prompt, *ids])
        routing = experts[len(prompt) :].to(torch.int16).clone()
        routing[-1] = -1
        group.append(Completion(list(ids), logprobs[len(prompt) - 1 :].tolist(), "", "stop", 0, routing=routing))
    return RolloutGroup(Prompt("p", "", list(prompt)), group, prompt_routing=experts[: len(prompt)].to(torch.int16))


@pytest.fixture
def sampler(random_policy):
    return random_policy(0, num_hidden_layers=3)


def _with_other_routers(sampler):
    """The policy that learns: the same weights, but its routers choose others."""
    policy = copy.deepcopy(sampler)
    for layer in policy.trunk.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([3.0, -3.0, 3.0, -3.0]))
    return policy


@pytest.mark.parametrize("budget", [100, 8])
def test_the_learner_scores_with_the_samplers_experts_prompt_included(sampler, budget):
    group, policy = _sampled(sampler), _with_other_routers(sampler)
    mismatch = {}
    for replay in (False, True):
        learner = _learner(copy.deepcopy(policy), replay, tokens_per_micro_batch=budget)
        mismatch[replay] = learner.step(learner.prepare([group], SCORES), 1)["mismatch/logprob_abs_max"]
    assert mismatch[False] > 0.01
    assert mismatch[True] < 1e-5
    without = copy.deepcopy(group)
    without.prompt_routing.fill_(-1)
    learner = _learner(policy, tokens_per_micro_batch=budget)
    assert learner.step(learner.prepare([without], SCORES), 1)["mismatch/logprob_abs_max"] > 0.01


def test_the_gradient_is_that_of_padded_rows_with_the_same_experts(sampler):
    group, policy = _sampled(sampler), _with_other_routers(sampler)
    by_hand = copy.deepcopy(policy)
    learner = _learner(policy, advantage="rloo")  # advantages 1 and -1
    learner.step(learner.prepare([group], SCORES), 1)
    loss = torch.zeros(())
    for completion, advantage in zip(group.completions, (1.0, -1.0), strict=True):
        routing = torch.cat([group.prompt_routing, completion.routing])[None]
        logprobs, _ = _padded(by_hand, group.prompt.token_ids + completion.token_ids, routing)
        loss = loss - advantage * logprobs[len(group.prompt.token_ids) - 1 :].sum() / 6
    loss.backward()
    for name, parameter in by_hand.trunk.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-6:
            got = policy.trunk.get_parameter(name).grad
            assert (got - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name
    assert policy.trunk.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("given", [{"beta": 0.1}, {"updates_per_batch": 2}, {"top_entropy_quantile": 0.5}])
def test_every_forward_of_a_step_replays(sampler, given):
    """Reference, old log-probabilities and entropies too: KL 0 and ratio 1 before the first update."""
    group, policy = _sampled(sampler), _with_other_routers(sampler)
    learner = _learner(policy, **given)
    learner.optimizer.param_groups[0]["peak"] = learner.optimizer.param_groups[1]["peak"] = 0.0
    metrics = learner.step(learner.prepare([group], SCORES), 1)
    assert metrics["mismatch/logprob_abs_max"] < 1e-5
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics.get("loss/kl", 0.0) == 0.0


def test_gradient_checkpointing_replays_in_the_backward_pass(sampler):
    group, gradients = _sampled(sampler), []
    for checkpointing in (False, True):
        policy = _with_other_routers(sampler)
        learner = _learner(policy, gradient_checkpointing=checkpointing)
        learner.step(learner.prepare([group], SCORES), 1)
        gradients.append({n: p.grad.clone() for n, p in policy.trunk.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_values_come_from_the_replayed_forward(sampler):
    group, values = _sampled(sampler), []
    for policy in (sampler, _with_other_routers(sampler)):
        learner = _learner(policy, advantage="gae")
        with torch.no_grad():
            term_of(learner, "value").head.layers[-1].weight.fill_(1.0)
        batch = learner.prepare([group], SCORES)
        values.append(torch.tensor([v for sample in batch.rows[0].samples for v in sample.values]))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-4)
    assert values[0].abs().max() > 0.01


def test_balance_counts_no_experts_of_drafts_that_were_not_taken(sampler):
    """Sampler and learner are one policy here, so that replay must not change how often an expert is counted."""
    params = SamplingParams(group_size=4, max_completion_tokens=12, draft_tokens=3, record_routing=True)
    prompts = [Prompt(f"p/{i}", "", [5 + i, 6, 7]) for i in range(4)]
    groups = Engine(sampler).sample(prompts, params)
    scores = [GroupScore([1.0, 0.0, 0.0, 1.0], {})] * len(groups)
    counts = []
    for replay in (True, False):
        learner = _learner(copy.deepcopy(sampler), replay)
        learner.step(learner.prepare(groups, scores), 1)
        counts.append(last_work(learner).fixed["balance"][0].chosen)
    assert torch.equal(counts[0], counts[1])


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_where_two_heads_nearly_tie_the_learner_takes_the_samplers(random_policy, draft_tokens):
    """Two heads of every layer score the same. A bias of 1e-5 does what rounding would: it makes the sampler choose one
    of them, and the learner the other."""
    policy = random_policy(0, num_attention_heads=4, num_key_value_heads=4)
    policy.choose_heads(0.5, 1)
    sampler = copy.deepcopy(policy)
    for side, better in ((sampler, 0), (policy, 1)):
        for router in routers(side.trunk, "self_attn").values():
            router.weight.data[1] = router.weight[0]
            router.e_score_correction_bias[:] = torch.tensor([0.0, 0.0, -1.0])
            router.e_score_correction_bias[better] = 1e-5
    params = SamplingParams(group_size=2, max_completion_tokens=12, draft_tokens=draft_tokens, record_routing=True)
    groups = Engine(sampler).sample([Prompt(f"p/{i}", "", [5 + i, 6, 7]) for i in range(3)], params)
    mismatch = {}
    for replay in (False, True):
        learner = _learner(copy.deepcopy(policy), replay)
        mismatch[replay] = learner.step(learner.prepare(groups, SCORES * 3), 1)["mismatch/logprob_abs_max"]
    assert mismatch[False] > 0.01
    assert mismatch[True] < 1e-5


def test_an_engine_that_records_nothing_is_named(sampler):
    group = RolloutGroup(Prompt("word/3", "", [5]), [Completion([6], [-1.0], "", "stop", 0)] * 2)
    with pytest.raises(ValueError, match=r"routing_replay: the sampler recorded no experts or .*word/3"):
        _learner(sampler).prepare([group], SCORES)


def test_a_run_replays_what_its_engine_records(micro_config, tmp_path):
    """End to end, with drafts: every token that was read has its experts, and both sides agree on them."""
    given = {"learner.routing_replay": True, "steps": 2, "balance.bias_rate": 0.01, "sft.steps": 0}
    train(micro_config(tmp_path / "run", **given))
    for line in read_metrics(tmp_path / "run"):
        if line["step"]:
            assert line["learner/updates"] == 1
            assert line["mismatch/logprob_abs_max"] < 1e-4
