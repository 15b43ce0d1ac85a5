"""The balancer in the learner: what it counts, when the bias moves, and what micro-batches change."""

import copy
import math

import pytest
import torch
from recorded import groups_of
from small_learner import gradients_of, last_work, learner_of, supervised_learner

from grpo.config.balance import BalanceOptions
from grpo.learner.learner import Learner
from grpo.learner.prepare import supervised
from grpo.learner.row import PackedRow, Sample
from policies.policy import Policy, checksum
from rewards.group_score import GroupScore
from rollout.workers.kinds import open_pool

ALL = {"bias_rate": 0.01, "entropy_weight": 0.1, "sequence_weight": 0.1}
REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]


def _learner(policy: Policy, balance: dict, **given) -> Learner:
    return learner_of(policy, balance=BalanceOptions(**balance), **given)


def _step(learner: Learner, step: int = 1, rewards=REWARDS, seed: int = 0) -> dict[str, float]:
    scores = [GroupScore(list(row), {"exact": list(row)}) for row in rewards]
    return learner.step(learner.prepare(groups_of(3, seed)[0], scores), step)


def _biases(policy: Policy) -> torch.Tensor:
    return torch.stack([b for n, b in policy.trunk.named_buffers() if n.endswith("e_score_correction_bias")]).clone()


def _moe(random_policy, **config) -> Policy:
    return random_policy(3, mtp=False, first_k_dense_replace=0, n_routed_experts=6, **config)


def test_off_it_changes_nothing_and_still_counts(random_policy):
    policy = _moe(random_policy)
    before = _biases(policy)
    metrics = _step(_learner(policy, {}))
    assert torch.equal(_biases(policy), before)
    assert metrics["moe/layer_1/load_max"] > 1
    assert not [name for name in metrics if name.startswith("loss/balance")]


@pytest.mark.parametrize("name", ["entropy_weight", "sequence_weight"])
def test_a_loss_adds_its_own_gradient_times_its_weight(random_policy, name):
    gradients = []
    for weight in (0.0, 0.5, 1.0):
        policy = _moe(random_policy)
        metrics = _step(_learner(policy, {name: weight}, entropy_coef=1e-12))  # reads tied groups in every case
        gradients.append(gradients_of(policy))
        if weight:
            layers_mean = metrics[f"loss/balance_{name.removesuffix('_weight')}"]
            added = metrics["loss/total"] - metrics["loss/policy"]
            assert added == pytest.approx(weight * 2 * layers_mean, abs=1e-5)  # two layers, added up
    none, half, whole = gradients
    router = "trunk.model.layers.1.mlp.gate.weight"
    assert (whole[router] - none[router]).norm() > 1e-3
    for parameter in none:
        torch.testing.assert_close(half[parameter], (none[parameter] + whole[parameter]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 25])
def test_sequence_loss_bias_and_statistics_do_not_see_micro_batches(random_policy, budget):
    """The entropy regulariser does, by definition: each micro-batch is balanced on its own."""
    whole, cut = _moe(random_policy), _moe(random_policy)
    balance = {"sequence_weight": 0.5, "bias_rate": 0.01}
    metrics = [_step(_learner(whole, balance)), _step(_learner(cut, balance, tokens_per_micro_batch=budget))]
    for name, expected in gradients_of(whole).items():
        torch.testing.assert_close(gradients_of(cut)[name], expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(_biases(whole), _biases(cut))
    for name, value in metrics[0].items():
        if name.startswith(("moe/", "loss/balance")):
            assert metrics[1][name] == pytest.approx(value, rel=1e-5), name


def test_entropy_of_micro_batches_is_their_mean_weighted_by_tokens(random_policy):
    whole, cut = _moe(random_policy), _moe(random_policy)
    balance = {"entropy_weight": 0.5}
    metrics = [_step(_learner(whole, balance)), _step(_learner(cut, balance, tokens_per_micro_batch=25))]
    assert 0 < metrics[0]["loss/balance_entropy"] < metrics[1]["loss/balance_entropy"] < math.log(6)


def test_the_bias_moves_once_a_step_by_the_counts_of_the_whole_step(random_policy):
    policy = _moe(random_policy)
    learner = _learner(policy, {"bias_rate": 0.25}, updates_per_batch=3, tokens_per_micro_batch=25)
    seen, before = [], _biases(policy)
    policy.trunk.model.layers[0].mlp.gate.register_forward_hook(lambda *_: seen.append(_biases(policy)))
    _step(learner)
    assert len(seen) > 6
    assert all(torch.equal(bias, before) for bias in seen)  # frozen for old log-probabilities and every update
    counts = last_work(learner).fixed["balance"][0].chosen
    tokens = sum(len(c.token_ids) for group in groups_of(2, 0)[0] for c in group.completions)  # the third is tied
    assert counts.sum(1).tolist() == [2 * 3 * tokens] * 2
    expected = before + 0.25 * (counts.float().mean(1, keepdim=True) - counts).sign()
    assert torch.equal(_biases(policy), expected)


def test_a_step_that_teaches_nothing_moves_nothing_unless_a_balance_loss_teaches(random_policy):
    tied = [[1.0] * 3] * 3
    policy = _moe(random_policy)
    before = _biases(policy)
    assert _step(_learner(policy, {"bias_rate": 0.25}), rewards=tied)["learner/updates"] == 0
    assert torch.equal(_biases(policy), before)
    assert _step(_learner(policy, ALL), rewards=tied)["learner/updates"] == 1
    assert not torch.equal(_biases(policy), before)


def test_contract_5_the_bias_is_published_and_part_of_the_digest(random_policy):
    policy = _moe(random_policy)
    learner = _learner(policy, {"bias_rate": 0.25}, learning_rate=1e-12)
    pool = open_pool(policy)
    before = checksum(learner.weights())
    _step(learner)
    assert checksum(learner.weights()) != before
    pool.sync_weights(learner.weights(), learner.policy_version)
    assert checksum(pool.engine.policy.weights()) == checksum(learner.weights())
    sampled_with = torch.stack([block.gate_bias for block in pool.engine.trunk.blocks])
    assert torch.equal(sampled_with, _biases(policy))


def test_contract_9_a_balanced_learner_goes_on_with_the_same_bits(random_policy):
    whole, resumed = _learner(_moe(random_policy), ALL), _learner(_moe(random_policy), ALL)
    _step(whole)
    tensors, state = copy.deepcopy(whole.state())
    resumed.load_state(tensors, state)
    for learner in (whole, resumed):
        _step(learner, 2, seed=1)
    first, second = whole.weights(), resumed.weights()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_reference_of_a_lora_run_keeps_the_bias_of_step_0(random_policy):
    policy = _moe(random_policy)
    policy.add_lora(2, 4.0)
    learner = _learner(policy, {"bias_rate": 1.0}, beta=0.1, learning_rate=1e-12)
    assert _step(learner)["loss/kl"] == pytest.approx(0, abs=1e-6)
    moved = _biases(policy)
    assert _step(learner, 2)["loss/kl"] > 1e-3  # the policy routes elsewhere now, the reference does not
    assert not torch.equal(_biases(policy), moved)  # and the policy's own bias came back behind the reference's forward


def test_gradient_checkpointing_changes_no_balance_gradient(random_policy):
    gradients = []
    for checkpointing in (False, True):
        policy = _moe(random_policy)
        _step(_learner(policy, ALL, gradient_checkpointing=checkpointing))
        gradients.append((gradients_of(policy), _biases(policy)))
    for name, expected in gradients[0][0].items():
        torch.testing.assert_close(gradients[1][0][name], expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_a_supervised_step_balances_too(random_policy):
    policy = _moe(random_policy)
    before, learner = _biases(policy), supervised_learner(policy, balance=BalanceOptions(**ALL))
    rows = [PackedRow([5, 6], [Sample(i, [7, 8, 9 + i])]) for i in range(4)]
    metrics = learner.step(supervised(rows))
    assert last_work(learner).fixed["balance"][0].chosen.sum() == 2 * 2 * 12
    assert metrics["loss/balance_sequence"] >= 0.9
    assert not torch.equal(_biases(policy), before)


def test_small_steps_of_the_bias_survive_bfloat16(random_policy):
    policy = _moe(random_policy).to(torch.bfloat16)
    learner = supervised_learner(policy, balance=BalanceOptions(bias_rate=0.0001))
    before = _biases(policy)
    learner.step(supervised([PackedRow([5], [Sample(0, [7, 8, 9, 10])])]))
    assert (_biases(policy) - before).abs().max() == pytest.approx(0.0001, rel=1e-2)


def test_balance_without_experts_is_refused_by_name(random_policy):
    dense = random_policy(0, first_k_dense_replace=2)
    with pytest.raises(ValueError, match=r"balance.bias_rate=0.01, but this policy has no routed experts"):
        _learner(dense, {"bias_rate": 0.01})
    assert not [name for name in _step(_learner(dense, {})) if name.startswith("moe/")]
