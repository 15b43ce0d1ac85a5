"""The losses by hand, against the installed TRL, by finite differences, and split into micro-batches (contract 10)."""

import math
from collections import defaultdict
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from trl_scoring import trl_scores

from grpo.algorithm import losses
from grpo.algorithm.losses import SAPO_TEMPERATURES, top_entropy_of
from grpo.algorithm.surrogates import importance_correction, sapo_surrogate
from grpo.algorithm.values import value_loss
from grpo.config.learner import LearnerOptions
from grpo.config.loss import LossOptions
from grpo.learner.terms.distill import top_k_kl
from policies.logprobs import token_logprobs

torch.set_num_threads(1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def policy_loss(
    policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, **given
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`losses.policy_loss`, with the options of the loss among the other arguments, unchecked, by TRL's names."""
    names = {"importance_sampling_mode": "correction"}
    most = given.pop("importance_sampling_clip_max", losses.MOST_WEIGHT)
    given = {names.get(name, name): value for name, value in given.items()}
    options = {name: given.pop(name) for name in list(given) if name in LossOptions.model_fields}
    others = [given.pop(f"{name}_logprobs", None) for name in ("sampling", "reference")]
    logprobs = losses.Logprobs(policy_logprobs, old_logprobs, *others)
    step = losses.WholeStep(**{name: given.pop(name) for name in losses.WholeStep._fields if name in given})
    chosen = LossOptions.model_construct(**options)
    with patch.object(losses, "MOST_WEIGHT", most):
        return losses.policy_loss(logprobs, advantages, mask, chosen, step=step, **given)


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOSS_TYPES = {
    "grpo": {},
    "dr_grpo": {"max_completion_length": 9},
    "dapo": {"epsilon_high": 0.28},
    "bnpo": {},
    "cispo": {"epsilon_high": 1.1},
    "sapo": {},
    "reinforce": {},
}


# ---- by hand -----------------------------------------------------------------------------------------------------

# Two completions: ratios π/π_old are 3/2, 1, 3/4 (advantage 2), and 1/2, 2 (advantage -1), padded with NaN.
POLICY = torch.tensor([[0.6, 0.5, 0.3], [0.2, 0.8, math.nan]]).log()
OLD = torch.tensor([[0.4, 0.5, 0.4], [0.4, 0.4, math.nan]]).log()
ADVANTAGES = torch.tensor([2.0, -1.0])
MASK = torch.tensor([[True, True, True], [True, True, False]])

BY_HAND = {
    # ε = 0.2: min(r·Â, clip(r)·Â) = 2.4, 2, 1.5 and -0.8 (the clip holds 0.5 at 0.8), -2 (unbounded above).
    # Minus the mean of the two means: -(5.9 / 3 - 2.8 / 2) / 2
    "grpo": ({}, -(5.9 / 3 - 1.4) / 2),
    "dapo": ({}, -(5.9 - 2.8) / 5),
    "bnpo": ({}, -(5.9 - 2.8) / 5),
    "dr_grpo": ({"max_completion_length": 10}, -(5.9 - 2.8) / (2 * 10)),
    # ε_high = 0.4: 1.5 is held at 1.4, so 2.8 in place of 2.4
    "dapo clip higher": ({"epsilon_high": 0.4}, -(6.3 - 2.8) / 5),
    # δ = 1.6 caps the ratio 2 of the negative advantage: -1.6 in place of -2
    "dapo two-sided": ({"delta": 1.6}, -(5.9 - 2.4) / 5),
    # weights min(r, 1.2) = 1.2, 1, 0.75 and 0.5, 1.2; times Â·log π
    "cispo": (
        {"epsilon_high": 1.2},
        -(2 * (1.2 * math.log(0.6) + math.log(0.5) + 0.75 * math.log(0.3)) - 0.5 * math.log(0.2) - 1.2 * math.log(0.8))
        / 5,
    ),
    # 4·σ(r - 1)·2 = 8·(σ(.5), σ(0), σ(-.25)) = 4.97967, 4, 3.50259; with τ = 1.05: -4/1.05·(σ(-.525), σ(1.05))
    # = -(1.41594, 2.82200)
    "sapo": ({}, -((4.97967 + 4 + 3.50259) / 3 - (1.41594 + 2.82200) / 2) / 2),
    "reinforce": ({}, -(2 * math.log(0.6 * 0.5 * 0.3) - math.log(0.2 * 0.8)) / 5),
    # s₁ = (3/2 · 1 · 3/4)^(1/3) = 1.125^(1/3) = 1.0400, s₂ = (1/2 · 2)^(1/2) = 1; neither is clipped
    "grpo sequence": ({"importance_sampling_level": "sequence"}, -(2 * 1.125 ** (1 / 3) - 1) / 2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_by_hand(name):
    options, expected = BY_HAND[name]
    loss, metrics = policy_loss(POLICY, OLD, ADVANTAGES, MASK, loss_type=name.split()[0], **options)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert metrics["loss/policy"].item() == loss.item()


def test_a_step_of_one_token_is_divided_by_one():
    one, mask = torch.ones(1, 1), torch.tensor([[True]])
    for kind in ("dapo", "bnpo"):
        assert policy_loss(-one, None, one[0], mask, loss_type=kind)[0].item() == -1
    assert policy_loss(-one, None, 0 * one[0], mask, entropy=one, entropy_coef=0.5)[0].item() == -0.5
    assert value_loss(one, 0.9 * one, 0 * one, mask)[0].item() == pytest.approx(0.5)  # 0.1 from 0.9 is not clipped
    assert top_entropy_of(one[:0, 0], 0.2).tokens == 0


def test_nothing_is_clipped_at_the_bound_or_where_there_is_no_advantage():
    one, mask = torch.ones(1, 1), torch.tensor([[True]])
    at_bound = [policy_loss(-one, -one, sign * one[0], mask, epsilon=0.0) for sign in (1, -1)]
    at_bound.append(policy_loss(-one, -one, one[0], mask, loss_type="cispo", epsilon_high=1.0))
    without = [policy_loss(-one, old * one, 0 * one[0], mask) for old in (0, -2)]
    assert [metrics["policy/clip_fraction"].item() for _, metrics in at_bound + without] == [0] * 5


def test_metrics_by_hand():
    _, metrics = policy_loss(
        POLICY,
        OLD,
        ADVANTAGES,
        MASK,
        sampling_logprobs=torch.tensor([[0.4, 0.5, 0.4], [0.4, 0.2, math.nan]]).log(),
        reference_logprobs=torch.tensor([[0.6, 0.5, 0.3], [0.2, 0.4, math.nan]]).log(),
        kl_estimator="k1",
        entropy=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, math.nan]]),
        importance_sampling_mode="token_truncate",
        importance_sampling_clip_max=1.5,
    )
    expected = {
        "policy/ratio_mean": (1.5 + 1 + 0.75 + 0.5 + 2) / 5,
        "policy/clip_fraction": 2 / 5,
        "policy/clip_fraction_low": 1 / 5,  # 0.5, Â < 0
        "policy/clip_fraction_high": 1 / 5,  # 1.5, Â > 0
        "policy/entropy": 15 / 5,
        "loss/kl": math.log(0.8 / 0.4) / 5,  # only the last token differs
        "mismatch/logprob_abs_mean": math.log(0.4 / 0.2) / 5,
        "mismatch/kl": (2 - 1 - math.log(2)) / 5,  # k3: ρ - 1 - log ρ at ρ = π_old / μ = 2
        "mismatch/weight_mean": (1 + 1 + 1 + 1 + 1.5) / 5,
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, abs=1e-6)
    assert set(metrics) == {"loss/policy", *expected}
    assert not any(value.requires_grad for value in metrics.values())


def test_kl_penalty_by_hand():
    # the same five tokens; d = log π_ref - log π = log(1/2) on the last one only: k3 = 1/2 + log 2 - 1 = 0.19315
    reference = torch.tensor([[0.6, 0.5, 0.3], [0.2, 0.4, math.nan]]).log()
    without = policy_loss(POLICY, OLD, ADVANTAGES, MASK)[0]
    k3 = 0.5 + math.log(2) - 1
    for estimator, kl in {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": k3, "unbiased": 2 * k3}.items():
        options = {"reference_logprobs": reference, "kl_estimator": estimator, "beta": 0.1}
        loss, metrics = policy_loss(POLICY, OLD, ADVANTAGES, MASK, **options)
        assert (loss - without).item() == pytest.approx(0.1 * kl / 5, abs=1e-6)
        assert metrics["loss/kl"].item() == pytest.approx(kl / 5, abs=1e-6)
    assert policy_loss(POLICY, OLD, ADVANTAGES, MASK, beta=0.1, kl_estimator="none")[0] == without


@pytest.mark.parametrize(
    ("mode", "weights"),
    [  # ratios π_old / μ: 4, 1/2 and 1, 1/5 (the third token is padding); products 2 and 1/5
        ("token_truncate", [[3.0, 0.5], [1.0, 0.2]]),
        ("token_mask", [[0.0, 0.5], [1.0, 0.2]]),
        ("sequence_truncate", [[2.0], [0.2]]),
        ("sequence_mask", [[2.0], [0.2]]),
    ],
)
def test_importance_correction_by_hand(mode, weights):
    old, sampling = torch.tensor([[0.8, 0.3, 1.0], [0.5, 0.1, 1.0]]), torch.tensor([[0.2, 0.6, 0.1], [0.5, 0.5, 0.1]])
    mask = torch.tensor([[True, True, False]] * 2)
    old.requires_grad_()
    actual = importance_correction(old.log(), sampling.log(), mask, mode, clip_max=3.0)
    assert not actual.requires_grad
    torch.testing.assert_close(actual[:, :2], torch.tensor(weights))
    usual = importance_correction(old.log(), sampling.log(), mask, "token_truncate")
    assert usual[0, :2].tolist() == pytest.approx([3.0, 0.5])  # of 4 and 1/2: the bound above is 3, and below is none
    assert sapo_surrogate(old, -old).equal(sapo_surrogate(old, -old, 1.0, 1.05))


def test_entropy_bonus_and_top_entropy_by_hand():
    entropies = torch.tensor([[0.1, 0.5, 0.2], [0.4, 0.3, math.nan]])
    loss, _ = policy_loss(POLICY, OLD, ADVANTAGES, MASK, entropy=entropies, entropy_coef=0.1)
    assert loss.item() == pytest.approx(-3.1 / 5 - 0.1 * 1.5 / 5, abs=1e-6)
    # ρ = 1/2: the threshold is the median, 0.3, so 0.5, 0.4 and 0.3 stay: objectives 2, -0.8, -2; still over 5 tokens
    top = {"entropy": entropies, "top_entropy_quantile": 0.5}
    assert policy_loss(POLICY, OLD, ADVANTAGES, MASK, **top)[0].item() == pytest.approx(0.8 / 5, abs=1e-6)
    # the bonus is the mean over those three
    loss, _ = policy_loss(POLICY, OLD, ADVANTAGES, MASK, **top, entropy_coef=0.1)
    assert loss.item() == pytest.approx(0.8 / 5 - 0.1 * 1.2 / 3, abs=1e-6)


@pytest.mark.parametrize("tokens", [11, 21, 31])
def test_the_bonus_is_the_mean_over_the_tokens_that_count(tokens):
    """ρ = .7 of 11: the threshold is the fourth smallest, and 8 count; but 1 - .7 is .30000000000000004, ten times that
    more than 3. All of equal entropies count: of 2, 1, 2 and 2 the median is 2, and three are the top half."""
    entropies = torch.arange(1.0, tokens + 1)[None].requires_grad_()
    zeros, mask = torch.zeros(1, tokens), torch.ones(1, tokens, dtype=torch.bool)
    given = {"entropy": entropies, "entropy_coef": 1.0, "top_entropy_quantile": 0.7}
    policy_loss(zeros, zeros, torch.zeros(1), mask, **given)[0].backward()
    top = 7 * (tokens - 1) // 10 + 1
    assert entropies.grad[0].tolist() == pytest.approx([0.0] * (tokens - top) + [-1 / top] * top)
    equal = torch.tensor([[2.0, 1.0, 2.0, 2.0]])
    given = {"entropy": equal, "entropy_coef": 1.0, "top_entropy_quantile": 0.5}
    assert policy_loss(zeros[:, :4], zeros[:, :4], torch.zeros(1), mask[:, :4], **given)[0].item() == -2.0


def test_the_top_tokens_of_a_large_step():
    """torch's quantile takes 2^24 values at most. Here they are 0, 1, ... 2^21, each eight times: 17 million tokens."""
    entropies = torch.arange(2**21 + 1).repeat_interleave(8).float()
    assert len(entropies) > 2**24
    top = top_entropy_of(entropies, 0.25)
    assert top.threshold.item() == 3 * 2**19
    assert top.tokens == 8 * (2**19 + 1)


def test_entropies_that_differ_by_rounding_are_equal():
    """The same context may be read in two micro-batches, and round differently. Half of six tokens: the last of them
    has two equals."""
    top = top_entropy_of(torch.tensor([0.9, 0.5, 0.5000003, 0.4999997, 0.1, 0.1]), 0.5)
    assert top.tokens == 4


def test_value_loss_by_hand():
    # V 1, 0, 5; V_old 0.5, 0, 5; R 2, 1, 0 (masked). clip(V) = 0.7, 0: squares 1, 1, clipped 1.69, 1
    values, old, returns = (
        torch.tensor([[1.0, 0.0, 5.0]]),
        torch.tensor([[0.5, 0.0, 5.0]]),
        torch.tensor([[2.0, 1.0, 0]]),
    )
    mask = torch.tensor([[True, True, False]])
    loss, metrics = value_loss(values, old, returns, mask)
    assert loss.item() == pytest.approx((1.69 + 1) / 2 / 2)
    assert metrics["value/clip_fraction"].item() == 0.5
    assert value_loss(values, old, returns, mask, num_completion_tokens=4)[0].item() == pytest.approx(loss.item() / 2)


def test_truncated_completions_leave_the_loss_and_stay_in_the_count_of_sequences():
    mask = torch.tensor([[True] * 3, [False] * 3])
    assert policy_loss(POLICY, OLD, ADVANTAGES, mask)[0].item() == pytest.approx(-5.9 / 3)
    assert policy_loss(POLICY, OLD, ADVANTAGES, mask, loss_type="grpo")[0].item() == pytest.approx(-5.9 / 3 / 2)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_fully_masked_batch_is_zero_and_finite(loss_type):
    policy = POLICY.clone().requires_grad_()
    options = {"entropy": torch.zeros(2, 3), "entropy_coef": 0.1, "top_entropy_quantile": 0.5}
    loss, metrics = policy_loss(
        policy, OLD, ADVANTAGES, torch.zeros_like(MASK), loss_type=loss_type, **LOSS_TYPES[loss_type], **options
    )
    loss.backward()
    assert loss.item() == 0
    assert not policy.grad.any()
    assert not any(value.item() for value in metrics.values())


# ---- a toy policy ------------------------------------------------------------------------------------------------


def toy(seed=0, completions=6, length=5, vocabulary=7):
    """A softmax policy with free logits, tokens sampled from it, and older, sampling and reference versions of it."""
    torch.manual_seed(seed)
    logits = torch.randn(completions, length, vocabulary, dtype=torch.float64)
    token_ids = torch.distributions.Categorical(logits=logits).sample()
    mask = torch.arange(length) < torch.tensor([[5], [1], [3], [4], [2], [5]])[:completions]

    def logprobs_of_another(distance):
        return token_logprobs(logits + distance * torch.randn_like(logits), token_ids)

    given = {
        "old_logprobs": logprobs_of_another(0.2),
        "sampling_logprobs": logprobs_of_another(0.4),
        "reference_logprobs": logprobs_of_another(0.5),
        "advantages": torch.randn(completions, dtype=torch.float64),
        "mask": mask,
    }
    return logits.requires_grad_(), token_ids, given


def toy_loss(logits, token_ids, given, **options):
    return policy_loss(token_logprobs(logits, token_ids), **given, entropy=entropy(logits), **options)


EVERYTHING = {"beta": 0.1, "entropy_coef": 0.05, "importance_sampling_mode": "token_truncate", "delta": 1.5}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_by_finite_differences(loss_type, level):
    logits, token_ids, given = toy(completions=3, length=3, vocabulary=4)
    # CISPO's weight is held fixed in its gradient; a cap below every ratio holds it fixed in the differences as well
    options = LOSS_TYPES[loss_type] | ({"epsilon_high": 0.1} if loss_type == "cispo" else {})
    options |= EVERYTHING | {"loss_type": loss_type, "importance_sampling_level": level}
    _, metrics = toy_loss(logits, token_ids, given, **options)
    if loss_type == "cispo":
        assert metrics["policy/clip_fraction"] == 1
    assert torch.autograd.gradcheck(lambda x: toy_loss(x, token_ids, given, **options)[0], logits)


def test_on_policy_every_loss_has_the_gradient_of_reinforce():
    """r = 1: clipping is idle and ∇r = ∇log π. Sequences of one length make all the denominators agree."""
    logits, token_ids, given = toy()
    given |= {"mask": torch.ones_like(given["mask"]), "old_logprobs": None}
    gradients = {}
    for loss_type, options in LOSS_TYPES.items():
        options = options | {"max_completion_length": 5}
        loss, metrics = toy_loss(logits, token_ids, given, loss_type=loss_type, **options)
        gradients[loss_type] = torch.autograd.grad(loss, logits)[0]
        assert metrics["policy/ratio_mean"] == 1
        assert not metrics.get("policy/clip_fraction", torch.tensor(0.0))
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["reinforce"])


# ---- contract 10 -------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "everything": EVERYTHING,
    "gspo": {"importance_sampling_level": "sequence", "importance_sampling_mode": "sequence_mask"},
    "top entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - {"bnpo"}))
def test_contract_10_micro_batching_changes_nothing(loss_type, variant):
    logits, token_ids, given = toy()
    mask = given["mask"]
    options = VARIANTS[variant] | LOSS_TYPES[loss_type] | {"loss_type": loss_type}
    if variant == "top entropy":
        options["top_entropy"] = top_entropy_of(entropy(logits)[mask], 0.4)
    whole, whole_metrics = toy_loss(logits, token_ids, given, **options)
    [whole_gradient] = torch.autograd.grad(whole, logits)
    counts = {"num_completion_tokens": int(mask.sum()), "num_sequences": len(mask)}

    total, total_metrics = 0.0, defaultdict(float)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):  # micro-batches of 1, 3 and 2 completions, 5, 8 and 7 tokens
        part = {name: value[rows] for name, value in given.items()}
        loss, metrics = toy_loss(logits[rows], token_ids[rows], part, **options, **counts)
        loss.backward()
        total += loss.item()
        for name, value in metrics.items():
            total_metrics[name] += value.item()

    assert total == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(logits.grad, whole_gradient)
    assert dict(total_metrics) == pytest.approx({name: value.item() for name, value in whole_metrics.items()})


def test_bnpo_is_local_by_definition():
    """A mean over each micro-batch: it adds up only where the micro-batches hold equally many tokens per completion."""
    logits, token_ids, given = toy()
    total = {}
    for name, mask in {"ragged": given["mask"], "equal": torch.ones_like(given["mask"])}.items():
        given["mask"] = mask
        whole = toy_loss(logits, token_ids, given, loss_type="bnpo")[0].item()
        parts = [
            toy_loss(logits[rows], token_ids[rows], {k: v[rows] for k, v in given.items()}, loss_type="bnpo",
                     num_sequences=6)[0].item()
            for rows in (slice(0, 2), slice(2, 6))
        ]  # fmt: skip
        total[name] = sum(parts) - whole
    assert total["equal"] == pytest.approx(0, abs=1e-12)
    assert abs(total["ragged"]) > 1e-3


def test_contract_10_value_loss_adds_up_over_micro_batches():
    torch.manual_seed(0)
    values, old, returns = torch.randn(3, 4, 5)
    mask = torch.rand(4, 5) < 0.7
    whole, _ = value_loss(values, old, returns, mask)
    parts = [
        value_loss(*(x[rows] for x in (values, old, returns, mask)), num_completion_tokens=int(mask.sum()))[0]
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_contract_1_only_the_mask_decides_what_counts(loss_type, level):
    """Padding may hold anything, NaN included, so a pad token that equals the stop token is no trap."""
    logits, token_ids, given = toy()
    mask = given.pop("mask")
    inputs = given | {
        "policy_logprobs": token_logprobs(logits, token_ids).detach(),
        "entropy": entropy(logits).detach(),
    }
    inputs["advantages"] = given["advantages"][:, None].repeat(1, mask.shape[1])

    def run(inputs):
        inputs["policy_logprobs"].requires_grad_()
        options = EVERYTHING | LOSS_TYPES[loss_type] | {"loss_type": loss_type, "importance_sampling_level": level}
        loss, metrics = policy_loss(**inputs, mask=mask, **options)
        loss.backward()
        return loss, metrics, inputs["policy_logprobs"].grad

    loss, metrics, gradient = run(inputs)
    poisoned = {name: value.detach().masked_fill(~mask, math.nan) for name, value in inputs.items()}
    loss_again, metrics_again, gradient_again = run(poisoned)
    assert loss_again == loss
    assert metrics_again == metrics
    assert torch.equal(gradient_again, gradient)
    assert not gradient[~mask].any()
    last = mask & ~mask.roll(-1, dims=1).index_fill(1, torch.tensor([mask.shape[1] - 1]), False)
    assert last.sum() == len(mask)
    assert gradient[last].all()  # the stop token learns


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown; use 'grpo', 'dr_grpo', 'dapo'"),
        ({"loss_type": "cispo"}, "cispo needs epsilon_high, the cap of the ratio"),
        ({"loss_type": "dr_grpo"}, "dr_grpo needs max_completion_length"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word' is unknown; use 'token' or"),
        ({"beta": 0.1}, "beta=0.1 needs reference_logprobs"),
        ({"beta": 0.1, "kl_estimator": "k4", "reference_logprobs": OLD}, "kl_estimator='k4' is unknown"),
        ({"importance_sampling_mode": "token_mask"}, "token_mask needs sampling_logprobs"),
        *(
            (
                {"importance_sampling_mode": mode, "sampling_logprobs": OLD},
                f"importance_sampling_mode='{mode}' is unknown",
            )
            for mode in ("mask", "token_clamp", "word_mask")
        ),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 needs entropy"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 needs entropy"),
    ],
)
def test_bad_input_names_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(POLICY, OLD, ADVANTAGES, MASK, **options)


# ---- the installed TRL -------------------------------------------------------------------------------------------


def trl_loss(logprobs, entropies, given, **options):
    """TRL's own loss on given log-probabilities: a trainer with everything but that taken away."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask = given["mask"].long()
    mode = options.get("importance_sampling_mode")
    inputs = {
        "prompt_ids": mask[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_logprobs"],
        "ref_per_token_logps": given["reference_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    if mode:
        inputs["importance_sampling_ratio"] = importance_correction(
            given["old_logprobs"], given["sampling_logprobs"], given["mask"], mode, 1.5
        )
    epsilon, epsilon_high = options.get("epsilon", 0.2), options.get("epsilon_high")
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    trainer = SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=options.get("delta"),
            use_bias_correction_kl=options.get("kl_estimator", "unbiased") == "unbiased",
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        get_high_entropy_mask=partial(GRPOTrainer.get_high_entropy_mask, SimpleNamespace(accelerator=accelerator)),
        _metrics=defaultdict(lambda: defaultdict(list)),
        loss_type=options["loss_type"],
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        beta=options.get("beta", 0.0),
        entropy_coef=options.get("entropy_coef", 0.0),
        _entropy_bonus_enabled=options.get("entropy_coef", 0.0) != 0,
        top_entropy_quantile=options.get("top_entropy_quantile", 1.0),
        max_completion_length=options.get("max_completion_length"),
        use_vllm=mode is not None,
        vllm_importance_sampling_correction=True,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
    )
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


TRL_VARIANTS = {
    "plain": {},
    "k3": {"beta": 0.1, "kl_estimator": "k3"},
    "unbiased KL": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.05},
    "top entropy": {"top_entropy_quantile": 0.3},
    "top entropy with bonus": {"top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    "delta": {"delta": 1.3},
    **{mode: {"importance_sampling_mode": mode} for mode in MODES},
    "everything": {"beta": 0.1, "delta": 1.3, "entropy_coef": 0.05, "importance_sampling_mode": "sequence_truncate"},
}


@pytest.mark.parametrize("variant", TRL_VARIANTS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", [loss_type for loss_type in LOSS_TYPES if loss_type != "reinforce"])
def test_equals_trl(loss_type, level, variant):
    for seed in range(3):
        logits, token_ids, given = toy(seed)
        options = TRL_VARIANTS[variant] | LOSS_TYPES[loss_type]
        options |= {"loss_type": loss_type, "importance_sampling_level": level}
        ours, metrics = toy_loss(logits, token_ids, given, **options, importance_sampling_clip_max=1.5)
        expected, trl_metrics = trl_loss(token_logprobs(logits, token_ids), entropy(logits), given, **options)
        assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
        assert gradients[0].abs().max() > 1e-3
        if level == "token" and loss_type in ("grpo", "dr_grpo", "dapo", "bnpo"):
            assert metrics["policy/clip_fraction"].item() == pytest.approx(trl_metrics["clip_ratio/region_mean"][0])


def test_options_and_defaults_are_those_of_trl():
    """Same name, same default, and the same names for the same choices."""
    from trl import GRPOConfig

    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    shared = {name: field.default for name, field in LossOptions.model_fields.items() if name in theirs}
    assert shared.keys() == {
        *("loss_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation", "epsilon"),
        *("epsilon_high", "delta", "beta", "entropy_coef", "top_entropy_quantile", "mask_truncated_completions"),
    }
    assert (theirs["sapo_temperature_pos"], theirs["sapo_temperature_neg"]) == SAPO_TEMPERATURES
    assert shared == {name: theirs[name] for name in shared}
    assert theirs["use_bias_correction_kl"]
    assert LossOptions().kl_estimator == "unbiased"
    assert theirs["vllm_importance_sampling_clip_max"] == losses.MOST_WEIGHT
    assert theirs["vllm_importance_sampling_clip_min"] is None
    assert theirs["num_iterations"] == LearnerOptions().updates_per_batch
    for name in ("epsilon", "epsilon_high"):
        assert getattr(LossOptions(), name) == theirs[name]


@pytest.mark.parametrize("mode", MODES)
def test_importance_correction_equals_trl(mode):
    """The weights themselves: TRL computes them where it scores completions."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    _, _, given = toy(2)
    mask, lengths = given["mask"], given["mask"].sum(1).tolist()
    count, length = mask.shape
    sampling = [row[:n].tolist() for row, n in zip(given["sampling_logprobs"], lengths, strict=True)]
    completion_ids = [[1] * n for n in lengths]
    output = trl_scores(
        GRPOTrainer,
        count,
        _generate=lambda _: ([[1]] * count, completion_ids, None, [""] * count, sampling, {}, None, None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (given["old_logprobs"], None, None),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.5,
        vllm_importance_sampling_clip_min=None,
    )
    expected = output["importance_sampling_ratio"]
    assert expected.shape[1] == (1 if mode.startswith("sequence") else length)
    assert len(expected.unique()) > 2  # bounds bite here and there
    assert torch.isin(expected, torch.tensor([0.0, 0.5, 1.5])).any()
    ours = importance_correction(given["old_logprobs"], given["sampling_logprobs"], mask, mode, 1.5)
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=0, atol=1e-5)


# ---- the KL of the teacher's k tokens and the rest ---------------------------------------------------------------


def test_a_kl_of_k_tokens_and_the_rest_by_hand():
    # rests are 1/8 and 1/4: 1/2 log(1/2 : 1/2) + 3/8 log(3/8 : 1/4) + 1/8 log(1/8 : 1/4)
    found = top_k_kl(torch.tensor([[0.5, 0.375]]).log(), torch.tensor([[0.5, 0.25]]).log())
    assert found.item() == pytest.approx(3 / 8 * math.log(3 / 2) - 1 / 8 * math.log(2))


def test_a_token_without_probability_adds_nothing_and_one_that_the_teacher_lacks_much():
    own = torch.tensor([[0.0, 0.25, 0.5]]).log().requires_grad_()
    same = top_k_kl(own, torch.tensor([[0.0, 0.25, 0.5]]).log())
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-7)
    assert own.grad.isfinite().all()
    assert top_k_kl(own, torch.tensor([[0.5, 0.25, 0.0]]).log()).item() > 400


def test_what_is_left_out_is_the_kl_inside_the_rest():
    # The two tokens of the rest are 3/16 and 1/16 of the policy, 1/8 and 1/8 of the teacher. As one they agree.
    own, teacher = (
        torch.tensor([[1 / 4, 1 / 2, 3 / 16, 1 / 16]]).log(),
        torch.tensor([[1 / 4, 1 / 2, 1 / 8, 1 / 8]]).log(),
    )
    assert top_k_kl(own[:, :2], teacher[:, :2]).item() == pytest.approx(0, abs=1e-7)
    inside = 1 / 4 * (3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2))
    for kept in (3, 4):  # a rest of one token, and none
        assert top_k_kl(own[:, :kept], teacher[:, :kept]).item() == pytest.approx(inside, abs=1e-6)


def test_its_gradient_over_all_tokens_is_that_of_the_kl():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    teacher = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    own = logits.log_softmax(-1)
    expected = torch.autograd.grad((own.exp() * (own - teacher)).sum(), logits, retain_graph=True)[0]
    for kept, close in ((5, True), (6, True), (2, False)):
        [found] = torch.autograd.grad(top_k_kl(own[:, :kept], teacher[:, :kept]).sum(), logits, retain_graph=True)
        assert torch.allclose(found, expected, atol=1e-5) == close
