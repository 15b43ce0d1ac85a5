"""Losses of tokens by their names: by hand, with their settings, and in a step of the learner."""

import math

import pytest
import torch
from recorded import groups_of
from small_learner import gradients_of

from grpo.config.learner import LearnerOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.terms.custom import NAME, PerToken, as_term
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.terms.token_losses import LOSSES, TokenLoss, gspo

HALF = math.log(0.5)


def ratios_of(ratios):
    """log p and log q: every token was sampled with probability 1/2, and now has `ratios` times it."""
    return torch.tensor(ratios).log().add(HALF).requires_grad_(), torch.full((len(ratios),), HALF)


@pytest.mark.parametrize(
    ("name", "ratios", "advantages", "loss", "gradient"),
    [
        # -w log p: the ratio is not read
        ("cross_entropy", [1.0, 2.0], [0.5, 3.0], [0.5 * math.log(2), 0.0], [-0.5, -3.0]),
        # -(1.5 · 2 + .5 · -1), and its gradient by log p is -r A
        ("importance_sampling", [1.5, 0.5], [2.0, -1.0], [-3.0, 0.5], [-3.0, 0.5]),
        # min(1.5 · 2, 1.2 · 2) = 2.4 and min(.5 · -1, .8 · -1) = -.8: both are clipped, and teach nothing
        ("ppo", [1.5, 0.5], [2.0, -1.0], [-2.4, 0.8], [0.0, 0.0]),
        # neither is: a good token below, a bad one above
        ("ppo", [0.5, 1.5], [2.0, -1.0], [-1.0, 1.5], [-1.0, 1.5]),
        # 1.2 · 2 · log .75 and .8 · -1 · log .25: clipped ratios weigh gradients, and pass them all
        ("cispo", [1.5, 0.5], [2.0, -1.0], [-2.4 * math.log(0.75), 0.8 * math.log(0.25)], [-2.4, 0.8]),
        # inside of the clip
        ("cispo", [1.0, 1.1], [2.0, 1.0], [-2 * HALF, -1.1 * math.log(0.55)], [-2.0, -1.1]),
        # log p A - .05/2 (log r)²
        ("dro", [2.0], [1.0], [0.025 * math.log(2) ** 2], [-1.0 + 0.05 * math.log(2)]),
        # 0 · 3 - .025 log² 2 and log .25 · -1 - .025 log² 2; its gradient by log p is -A + .05 log r
        (
            "dro",
            [2.0, 0.5],
            [3.0, -1.0],
            [0.025 * math.log(2) ** 2, 0.025 * math.log(2) ** 2 + math.log(0.25)],
            [-3.0 + 0.05 * math.log(2), 1.0 - 0.05 * math.log(2)],
        ),
        # the geometric mean of 4 and 1 is 2, which is clipped to 1.2 where the advantage is positive
        ("gspo", [4.0, 1.0], [1.0, -1.0], [-1.2, 2.0], [0.0, 2.0]),
        ("gspo", [4.0, 1.0], [3.0, -2.0], [-1.2 * 3, 2 * 2.0], [0.0, 4.0]),
        # every ratio is 1 and none is clipped: each token has the gradient of its own advantage
        ("gspo", [1.0, 1.0], [3.0, -2.0], [-3.0, 2.0], [-3.0, 2.0]),
    ],
)
def test_a_loss_and_its_gradient_by_hand(name, ratios, advantages, loss, gradient):
    logprobs, sampled = ratios_of(ratios)
    losses = TokenLoss(name)(logprobs, sampled, torch.tensor(advantages), torch.ones(len(ratios)))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx(gradient, abs=1e-6)


def test_the_ratio_of_cispo_has_no_gradient():
    """One token at the ratio 1, log p = -1, A = 2: the gradient of -sg(r) A log p is -A = -2. With a gradient through r
    it would be -r A (1 + log p) = 0."""
    logprobs = torch.tensor([-1.0], requires_grad=True)
    TokenLoss("cispo")(logprobs, torch.tensor([-1.0]), torch.tensor([2.0]), torch.ones(1)).sum().backward()
    assert logprobs.grad.tolist() == [-2.0]


def test_gspo_reads_the_ratio_of_the_tokens_that_its_mask_marks():
    """Each sequence by itself; one without any token in the mask has the ratio 1, and not NaN."""
    logprobs, sampled = ratios_of([4.0, 1.0])
    of_three = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    losses = gspo(logprobs.expand(3, 2), sampled.expand(3, 2), -torch.ones(3, 2), of_three)
    assert losses.tolist() == [pytest.approx([1.0, 1.0]), pytest.approx([2.0, 2.0]), pytest.approx([1.0, 1.0])]


def test_settings_are_taken_and_what_a_loss_does_not_read_is_refused():
    logprobs, sampled = ratios_of([1.5])
    loss = TokenLoss("ppo", clip_high_threshold=1.4)
    assert loss(logprobs, sampled, torch.tensor([2.0]), torch.ones(1)).item() == pytest.approx(-2.8)
    assert loss.settings == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.4}
    assert loss == TokenLoss("ppo", 0.8, 1.4) != TokenLoss("ppo")
    for name, settings, words in (
        ("grpo", {}, "loss 'grpo': there is none of this name; use cross_entropy, importance_sampling, ppo"),
        ("ppo", {"beta": 0.1}, "beta=0.1: ppo takes numbers for clip_low_threshold, clip_high_threshold"),
        ("cross_entropy", {"beta": 0.1}, "beta=0.1: cross_entropy takes numbers for nothing"),
        ("dro", {"beta": "much"}, "beta='much': dro takes numbers for beta"),
        ("dro", {"beta": math.inf}, "beta=inf: use a finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            TokenLoss(name, **settings)


def test_a_loop_takes_them_by_name_unless_the_name_is_a_loss_type():
    first = PolicyTerm(LossOptions())
    for name in LOSSES:
        term = as_term(name, first)
        if name == "cispo":
            assert term.options.loss_type == "cispo"
        else:
            assert isinstance(term, PerToken)
            assert term.function == TokenLoss(name)
    loss = TokenLoss("cispo", clip_high_threshold=5.0)
    assert as_term(loss, first).function is loss
    assert as_term(gspo, first).function is gspo


def test_in_a_step_it_is_the_mean_over_the_tokens(micro_policy):
    """With the gradient of the same formula as a function of a caller, summed and divided by hand."""
    found = []
    for loss in ("importance_sampling", None):
        policy = micro_policy(0)
        options = LearnerOptions(learning_rate=1e-3, max_grad_norm=1e9, tokens_per_micro_batch=40)
        learner = Learner(policy, options, [PolicyTerm(LossOptions())], Likelihood(policy), loss=LossOptions())
        groups, scores = groups_of(3)
        batch = learner.prepare(groups, scores)
        if loss:
            metrics = learner.forward_backward(batch, as_term(loss, learner.terms[0]))
        else:
            total, tokens = torch.zeros(()), 0
            for mini in learner._shared(batch.rows):
                logprobs = learner.likelihood.forward(mini).logprobs
                ratio = (logprobs - mini.sampling_logprobs).exp()
                total = total - (ratio * mini.advantages[:, None])[mini.mask].sum()
                tokens += int(mini.mask.sum())
            (total / tokens).backward()
            assert metrics[NAME] == pytest.approx((total / tokens).item(), abs=1e-6)
        found.append(gradients_of(policy.trunk))
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], atol=1e-6, rtol=1e-4)
