"""Advantages by hand, against the installed TRL, and at the edges: ties, abstentions, one lonely sample."""

import math
from typing import get_args

import pytest
import torch
from trl_scoring import trl_scores

import grpo.config.loss
from grpo.algorithm.advantages import EPSILON, group_relative, multi_objective, reinforce_plus_plus, rloo, tied_groups
from grpo.algorithm.values import gae, outcome_rewards, rank_softmax_weights, whiten
from grpo.learner.terms.distill import distill
from rewards.group_score import LARGEST
from rewards.ties import tied

torch.set_num_threads(1)
NAN = math.nan


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def test_group_relative_by_hand():
    # group 1: mean 2, deviations -1, 0, 1, std √((1 + 0 + 1) / 2) = 1
    # group 2: the None is left out: mean 3, deviations -1, 1, std √((1 + 1) / 1) = √2
    rewards = [[1.0, 2.0, 3.0], [2.0, None, 4.0]]
    first, second = 1 / (1 + EPSILON), 1 / (math.sqrt(2) + EPSILON)
    advantages_PG, tied_P = group_relative(rewards)
    close(advantages_PG, [[-first, 0, first], [-second, 0, second]])
    assert tied_P.tolist() == [False, False]
    # the batch: 1, 2, 3, 2, 4: mean 2.4, squares 1.96, .16, .36, .16, 2.56 sum to 5.2, std √(5.2 / 4) = √1.3
    batch = 1 / (math.sqrt(1.3) + EPSILON)
    close(group_relative(rewards, "batch")[0], [[-batch, 0, batch], [-batch, 0, batch]])
    close(group_relative(rewards, "none")[0], [[-1, 0, 1], [-1, 0, 1]])


def test_none_nan_and_tensors_mean_the_same():
    expected = group_relative([[1, None, 0]])[0]
    assert torch.equal(group_relative([[1, NAN, 0]])[0], expected)
    assert torch.equal(group_relative(torch.tensor([[1, NAN, 0]]))[0], expected)
    assert expected.dtype == torch.float32


def test_rloo_by_hand():
    # 5 - (1 + 3) / 2, 1 - (5 + 3) / 2, 3 - (5 + 1) / 2; in group 2 two remain: each minus the other
    close(rloo([[5, 1, 3], [None, 1, 3]])[0], [[3, -3, 0], [0, -2, 2]])


def test_reinforce_plus_plus_by_hand():
    # rewards 1, 3, 5, 7: mean 4, std √((9 + 1 + 1 + 9) / 3) = √(20/3)
    scale = 1 / (math.sqrt(20 / 3) + EPSILON)
    close(reinforce_plus_plus([[1, 3], [5, 7]])[0], [[-3 * scale, -scale], [scale, 3 * scale]])
    # minus the group's mean: -1, 1, -1, 1: mean 0, std √(4/3)
    scale = 1 / (math.sqrt(4 / 3) + EPSILON)
    close(reinforce_plus_plus([[1, 3], [5, 7]], baseline=True)[0], [[-scale, scale], [-scale, scale]])


def test_several_rewards_by_hand():
    rewards = [[[1.0, 4.0], [0.0, 0.0]], [[None, 1.0], [None, 3.0]]]  # the first reward does not apply to prompt 2
    # sum, weights 1 and 1/2: 3, 0 and 1/2, 3/2: group means 3/2 and 1
    close(multi_objective(rewards, [1.0, 0.5], scale_rewards="none")[0], [[1.5, -1.5], [-0.5, 0.5]])
    # each on its own, deviation over std: ±(1/2)/√(1/2), ±2/√8, and ±1/√2: all ±√(1/2), but for the epsilons
    one, two, three = 0.5 / (math.sqrt(0.5) + EPSILON), 2 / (math.sqrt(8) + EPSILON), 1 / (math.sqrt(2) + EPSILON)
    a, b = one + 0.5 * two, 0.5 * three  # totals a, -a and -b, b: mean 0, std √(2(a² + b²) / 3)
    scale = 1 / (math.sqrt(2 * (a * a + b * b) / 3) + EPSILON)
    advantages_PG, tied_P = multi_objective(rewards, [1.0, 0.5], "normalize_then_sum")
    close(advantages_PG, [[a * scale, -a * scale], [-b * scale, b * scale]])
    assert not tied_P.any()


def test_rank_softmax_weights_by_hand():
    # ranks 1, 0, 2; e^(rank / 2): 1.6487, 1, 2.7183, sum 5.3670
    close(rank_softmax_weights([[2.0, -5.0, 2.1]], temperature=2.0), [[0.30720, 0.18632, 0.50648]], atol=1e-5)
    # 5 and 5 share ranks 1 and 2: e^1.5 twice and e^0: 4.4817, 4.4817, 1, sum 9.9634
    close(rank_softmax_weights([[5.0, 1.0, 5.0, None]]), [[0.44982, 0.10037, 0.44982, 0.0]], atol=1e-5)
    assert rank_softmax_weights([[None, None]]).tolist() == [[0.0, 0.0]]


def test_gae_by_hand():
    # λ = 0.5, V = 1, 2, 3, rewards 0, 0, 10. Backwards:
    # δ₂ = 10 - 3 = 7, δ₁ = 3 - 2 = 1, δ₀ = 2 - 1 = 1
    # Â₂ = 7, Â₁ = 1 + 0.5·7 = 4.5, Â₀ = 1 + 0.5·4.5 = 3.25
    # row 2 stops after one token: δ₀ = 4 - 1 = 3; what follows (NaN here) does not count
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, NAN, NAN]])
    rewards = torch.tensor([[0.0, 0.0, 10.0], [4.0, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages_BT, returns_BT = gae(rewards, values, mask, lam=0.5)
    close(advantages_BT, [[3.25, 4.5, 7.0], [3.0, 0.0, 0.0]])
    close(returns_BT, [[4.25, 6.5, 10.0], [4.0, 0.0, 0.0]])
    close(gae(rewards, values, mask)[0], gae(rewards, values, mask, lam=0.95)[0])
    close(gae(rewards[1:, :1], values[1:, :1], mask[1:, :1])[0], [[3.0]])  # one token is a completion too


def test_a_teacher_says_nothing_off_the_mask():
    logprobs, mask = torch.tensor([[0.5, NAN]]).log(), torch.tensor([[True, False]])
    assert distill(logprobs, logprobs, mask).tolist() == [[0.0, 0.0]]


def test_outcome_rewards_refuse_a_completion_without_one():
    mask_BT = torch.tensor([[True, True], [True, False]])
    with pytest.raises(ValueError, match="without a reward"):
        outcome_rewards(torch.tensor([1.0, NAN]), mask_BT)
    mask_BT[1] = False  # once it is masked out, its reward does not matter
    assert outcome_rewards(torch.tensor([1.0, NAN]), mask_BT).tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_whiten_gives_mean_zero_and_std_one_on_the_mask():
    torch.manual_seed(0)
    x_BT, mask_BT = 3 + 5 * torch.randn(4, 50), torch.rand(4, 50) < 0.7
    white_BT = whiten(x_BT, mask_BT)
    assert white_BT[mask_BT].mean().item() == pytest.approx(0, abs=1e-5)
    assert white_BT[mask_BT].std().item() == pytest.approx(1, abs=1e-4)
    assert not white_BT[~mask_BT].any()


GROUP_RELATIVE = {
    "group": lambda rewards: group_relative(rewards),
    "batch": lambda rewards: group_relative(rewards, "batch"),
    "none": lambda rewards: group_relative(rewards, "none"),
    "rloo": rloo,
    "reinforce++ with baseline": lambda rewards: reinforce_plus_plus(rewards, baseline=True),
    "sum_then_normalize": lambda rewards: multi_objective(rewards[..., None], [0.3]),
    "normalize_then_sum": lambda rewards: multi_objective(rewards[..., None], [0.3], "normalize_then_sum"),
}


@pytest.mark.parametrize("estimator", GROUP_RELATIVE)
def test_contract_10_tied_groups_contribute_zero(estimator):
    """NeMo-RL#4161: the fp32 residue of rewards - mean, over a std of next to nothing, was an advantage of 7428."""
    values = torch.tensor([0.1, 0.7, 1 / 3, 123.456, -1e-3, 1e6, 0.0])
    rewards_PG = values[:, None].repeat(1, 7)
    residue = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).abs().max()
    assert residue > 0  # the trap is real: without the tie check there is something to blow up
    contrast = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    advantages_PG, tied_P = GROUP_RELATIVE[estimator](torch.cat([rewards_PG, contrast]))
    assert tied_P.tolist() == [True] * len(values) + [False]
    assert not advantages_PG[:-1].any()
    assert advantages_PG[-1].all()


def test_rewards_that_differ_only_by_fp32_rounding_are_tied():
    almost = torch.tensor([[0.1 + 0.2, 0.3, 0.3]])
    almost[0, 0] = torch.nextafter(almost[0, 1], torch.tensor(1.0))
    assert almost[0, 0] != almost[0, 1]
    advantages_PG, tied_P = group_relative(almost)
    assert tied_P.item()
    assert not advantages_PG.any()
    assert not tied_groups(torch.tensor([[0.3, 0.3, 0.3001]])).item()
    large = [[1e6, 1e6 + 0.5], [1e6, 1e6 + 3]]
    assert tied_groups(torch.tensor(large, dtype=torch.float64)).tolist() == [tied(row) for row in large]
    assert [tied(row) for row in large] == [True, False]
    with pytest.raises(ValueError, match=r"a reward among \[0.0, inf\] is infinite; return a finite number, or None"):
        tied([0.0, math.inf])


@pytest.mark.parametrize("estimator", GROUP_RELATIVE)
def test_a_group_with_one_reward_or_none_is_tied(estimator):
    rewards_PG = torch.tensor([[NAN, 5.0, NAN], [NAN, NAN, NAN], [0.0, NAN, 1.0]])
    advantages_PG, tied_P = GROUP_RELATIVE[estimator](rewards_PG)
    assert tied_P.tolist() == [True, True, False]
    assert not advantages_PG[:2].any()
    assert advantages_PG[2, 1] == 0  # abstained
    assert advantages_PG[2, 0] < 0 < advantages_PG[2, 2]


def test_reinforce_plus_plus_keeps_a_tied_group_and_zeroes_a_tied_batch():
    advantages_PG, tied_P = reinforce_plus_plus([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]])
    assert tied_P.tolist() == [True, True]
    assert (advantages_PG[0] < 0).all()
    assert (advantages_PG[1] > 0).all()
    assert not reinforce_plus_plus([[0.1, 0.1, 0.1], [0.1, 0.1, None]])[0].any()


def test_bad_input_names_the_way_out():
    with pytest.raises(ValueError, match=r"reward at \[1, 0\] is inf; return a number between ±1e\+30, or None"):
        group_relative([[0.0, 1.0], [math.inf, 0.0]])
    for too_large in ([[1e308, -1e308, 0.0]], [[1e200, 0.0, 0.0]]):  # whose squares overflow: all advantages were 0
        with pytest.raises(ValueError, match=r"reward at \[0, 0\] is 1e\+\d+; return a number between ±1e\+30"):
            group_relative(too_large)
    with pytest.raises(ValueError, match="scale_rewards='std' is unknown; use 'group', 'batch' or 'none'"):
        group_relative([[0.0, 1.0]], "std")
    with pytest.raises(ValueError, match="3 reward_weights for 2 rewards"):
        multi_objective([[[0.0, 1.0], [1.0, 1.0]]], [1, 1, 1])
    with pytest.raises(ValueError, match="multi_objective_aggregation='sum' is unknown"):
        multi_objective([[[0.0, 1.0], [1.0, 1.0]]], [1, 1], "sum")


def trl_advantages(trainer_class, rewards_PGK, weights, aggregation="sum_then_normalize", scale_rewards="group"):
    """Runs TRL's own scoring on given rewards."""
    prompts, group_size, functions = rewards_PGK.shape
    count = prompts * group_size
    generated = [[1]] * count, [[2]] * count, None, [""] * count, None, {}, None, None
    if trainer_class.__name__ == "RLOOTrainer":
        generated = [[1]] * count, [[2]] * count, [""] * count
    output = trl_scores(
        trainer_class,
        count,
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *_: rewards_PGK.reshape(count, functions).clone(),
        reward_weights=torch.tensor(weights),
        reward_funcs=range(functions),
        reward_func_names=range(functions),
        reward_clip_range=None,
        multi_objective_aggregation=aggregation,
        scale_rewards=scale_rewards,
        normalize_advantages=False,
        num_generations=group_size,
    )
    return output["advantages"].view(prompts, group_size)


def random_rewards_PGK():
    torch.manual_seed(0)
    rewards_PGK = torch.randn(6, 5, 2)
    rewards_PGK[0, 1, 0] = NAN  # one function abstained
    rewards_PGK[1, 2] = NAN  # all did
    rewards_PGK[2] = 0.25  # tied
    rewards_PGK[3, 1:] = NAN  # one sample remains
    rewards_PGK[4, :, 1] = NAN  # a function that does not apply to the prompt
    return rewards_PGK


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_equals_trl(aggregation, scale_rewards):
    from trl.trainer.grpo_trainer import GRPOTrainer

    rewards_PGK, weights = random_rewards_PGK(), [1.0, 0.3]
    expected_PG = trl_advantages(GRPOTrainer, rewards_PGK, weights, aggregation, scale_rewards)
    assert expected_PG.any()
    close(multi_objective(rewards_PGK, weights, aggregation, scale_rewards)[0], expected_PG, atol=1e-5)


def test_rloo_equals_trl():
    from trl.trainer.rloo_trainer import RLOOTrainer

    rewards_PGK = random_rewards_PGK()[..., :1]
    expected_PG = trl_advantages(RLOOTrainer, rewards_PGK, [1.0])
    assert expected_PG.any()
    close(rloo(rewards_PGK[..., 0])[0], expected_PG, atol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_scores_that_a_reward_may_give_stay_finite_in_every_estimator(sign):
    rewards_PG = [[LARGEST, -LARGEST, 0.0, sign * LARGEST]] * 64 + [[0.0, LARGEST, None, 1.0]]
    found = [group_relative(rewards_PG, scale)[0] for scale in ("group", "batch", "none")]
    found += [
        rloo(rewards_PG)[0],
        reinforce_plus_plus(rewards_PG)[0],
        reinforce_plus_plus(rewards_PG, baseline=True)[0],
    ]
    rewards_PGK = [[[reward, reward] for reward in row] for row in rewards_PG]
    found += [multi_objective(rewards_PGK, [1.0, 1.0], how)[0] for how in get_args(grpo.config.loss.Aggregation)]
    for advantages_PG in found:
        assert advantages_PG.isfinite().all()
        assert advantages_PG.square().sum().isfinite()  # fp32
        assert advantages_PG.any()
