"""The losses of Tinker's API, by hand and by another way of computing them."""

import math

import pytest
import torch

from grpo.tinker.losses import check_datum, loss_of
from grpo.tinker.wire import Datum, Refused

HALF = math.log(0.5)


def inputs(ratios, advantages, mask=None):
    """What was sampled had probability 1/2; the policy's is `ratios` times it."""
    of = {"logprobs": torch.full((len(ratios),), HALF), "advantages": torch.tensor(advantages)}
    of |= {} if mask is None else {"sequence_ratio_mask": torch.tensor(mask)}
    return torch.tensor(ratios).log().add(HALF).requires_grad_(), of


@pytest.mark.parametrize(
    ("name", "ratios", "advantages", "loss", "gradient"),
    [
        # -(1.5 · 2 + .5 · -1), and its gradient by log p is -r A
        ("importance_sampling", [1.5, 0.5], [2.0, -1.0], -2.5, [-3.0, 0.5]),
        # min(1.5 · 2, 1.2 · 2) = 2.4 and min(.5 · -1, .8 · -1) = -.8: both are clipped, and teach nothing
        ("ppo", [1.5, 0.5], [2.0, -1.0], -1.6, [0.0, 0.0]),
        # neither is: a good token below, a bad one above
        ("ppo", [0.5, 1.5], [2.0, -1.0], 0.5, [-1.0, 1.5]),
        # 1.2 · 2 · log .75 and .8 · -1 · log .25: clipped ratios weigh gradients, and pass them all
        ("cispo", [1.5, 0.5], [2.0, -1.0], -(2.4 * math.log(0.75) - 0.8 * math.log(0.25)), [-2.4, 0.8]),
        # at the ratio 1, and inside of the clip: the ratio is a weight, and has no gradient of its own
        ("cispo", [1.0, 1.1], [2.0, 1.0], -(2 * HALF + 1.1 * math.log(0.55)), [-2.0, -1.1]),
        # log p A - .05/2 (log r)²
        ("dro", [2.0], [1.0], 0.025 * math.log(2) ** 2, [-1.0 + 0.05 * math.log(2)]),
        # -(0 · 3 - .025 log² 2) and -(log .25 · -1 - .025 log² 2); its gradient by log p is -A + .05 log r
        (
            "dro",
            [2.0, 0.5],
            [3.0, -1.0],
            2 * 0.025 * math.log(2) ** 2 + math.log(0.25),
            [-3.0 + 0.05 * math.log(2), 1.0 - 0.05 * math.log(2)],
        ),
        # the geometric mean of 4 and 1 is 2, which is clipped to 1.2 where the advantage is positive
        ("gspo", [4.0, 1.0], [1.0, -1.0], -1.2 + 2.0, [0.0, 2.0]),
        ("gspo", [4.0, 1.0], [3.0, -2.0], -1.2 * 3 + 2 * 2.0, [0.0, 4.0]),
        # every ratio is 1 and none is clipped: each token has the gradient of its own advantage
        ("gspo", [1.0, 1.0], [3.0, -2.0], -1.0, [-3.0, 2.0]),
    ],
)
def test_a_loss_and_its_gradient_by_hand(name, ratios, advantages, loss, gradient):
    logprobs, of = inputs(ratios, advantages, [1.0] * len(ratios))
    entry, settings = loss_of(name, {})
    total = entry.of(logprobs, of, settings)
    total.backward()
    assert total.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx(gradient, abs=1e-6)


def test_a_supervised_loss_is_the_sum_over_its_weights():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, settings = loss_of("cross_entropy", {})
    total = loss.of(logprobs, {"weights": torch.tensor([0.5, 0.0, 2.0])}, settings)
    total.backward()
    assert total.item() == 0.5 + 6.0
    assert logprobs.grad.tolist() == [-0.5, 0.0, -2.0]


def test_gspo_reads_the_ratio_of_the_tokens_that_its_mask_marks():
    logprobs, of = inputs([4.0, 1.0], [1.0, 1.0], [0.0, 1.0])
    entry, settings = loss_of("gspo", {})
    assert entry.of(logprobs, of, settings).item() == pytest.approx(-2.0)  # the marked token's ratio, 1, for both


def test_settings_of_a_loss_are_taken():
    logprobs, of = inputs([1.5], [2.0])
    entry, settings = loss_of("ppo", {"clip_high_threshold": 1.4})
    assert entry.of(logprobs, of, settings).item() == pytest.approx(-2.8)
    assert loss_of("dro", {"beta": 1})[1] == {"beta": 1.0}  # JSON writes 1.0 as 1
    assert loss_of("dro", {})[1] == {"beta": 0.05}
    assert loss_of("ppo", {})[1] == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def test_what_is_no_loss_is_refused_by_name():
    for name, config, words in (
        ("stable_reinforce", {}, "its formula is not published"),
        ("custom", {}, "forward_backward_custom at the client"),
        ("grpo", {}, "use cross_entropy, importance_sampling, ppo, cispo, dro, gspo"),
        ("ppo", {"epsilon": 0.2}, "ppo takes numbers for clip_low_threshold, clip_high_threshold"),
        ("dro", {"beta": "much"}, "'much'"),
        ("cross_entropy", {"beta": 1.0}, r"'beta'\]=1.0: cross_entropy takes numbers for nothing"),
    ):
        with pytest.raises(Refused, match=words):
            loss_of(name, config)


def test_a_datum_that_a_loss_cannot_read_is_refused_with_its_place():
    nothing_marked = {name: torch.zeros(2) for name in ("logprobs", "advantages", "sequence_ratio_mask")}
    for name, tokens, changes, words in (
        ("cross_entropy", [1, 2], {"target_tokens": None}, "target_tokens must be int64 of shape"),
        ("cross_entropy", [1, 2], {"target_tokens": torch.tensor([1])}, "target_tokens must be int64"),
        ("cross_entropy", [1, 2], {"target_tokens": torch.tensor([1.0, 2.0])}, "target_tokens must be int64"),
        ("cross_entropy", [1, 2], {"target_tokens": torch.tensor([1, 9])}, "outside the vocabulary of 9"),
        ("cross_entropy", [1, -2], {}, "model_input has a token outside"),
        ("cross_entropy", [], {"target_tokens": torch.tensor([], dtype=torch.long)}, "the context is 1 to 4"),
        ("cross_entropy", [1, 2], {"weights": torch.ones(3)}, r"weights is \[3\]"),
        ("cross_entropy", [1, 2], {"weights": torch.tensor([1.0, math.nan])}, "not finite"),
        ("cross_entropy", [1, 2], {"advantages": torch.ones(2)}, "reads target_tokens, weights"),
        ("ppo", [1, 2], {"advantages": torch.ones(2)}, "reads logprobs, which is missing"),
        ("gspo", [1, 2], nothing_marked, "marks no token"),
    ):
        of = {"target_tokens": torch.tensor([1, 2])} | changes
        datum = Datum(tokens, {key: value for key, value in of.items() if value is not None})
        with pytest.raises(Refused, match=words) as refusal:
            check_datum(datum, 3, name, vocabulary=9, context=4)
        assert "data[3]" in str(refusal.value)


def test_a_datum_may_be_one_token_or_the_whole_context_and_has_the_weights_1():
    for tokens in ([8], [1, 2, 3, 0]):
        datum = Datum(tokens, {"target_tokens": torch.tensor(tokens)})
        check_datum(datum, 0, "cross_entropy", vocabulary=9, context=4)
        assert datum.inputs["weights"].tolist() == [1.0] * len(tokens)
    targets = torch.tensor([[1, 2], [3, 4]])  # two targets of each token
    check_datum(Datum([1, 2], {"target_tokens": targets}), 0, "cross_entropy", vocabulary=9, context=4)
