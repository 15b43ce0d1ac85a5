"""The policy term by hand: when it teaches, what it settles, and what it gives to the loss."""

import doctest
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from grpo.config.loss import LossOptions
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms import policy
from grpo.learner.terms.policy import FARTHEST, PolicyTerm, Settled


def work_of(**given) -> SimpleNamespace:
    """Of a step of six tokens of two completions."""
    batch = SimpleNamespace(age=lambda version: 0.0, num_completion_tokens=6, num_samples=2)
    return SimpleNamespace(**{"batch": batch, "version": 1, "fixed": {}, "rows": [], "number": 0, "minis": []} | given)


def test_docstring_examples():
    assert doctest.testmod(policy).failed == 0


@pytest.mark.parametrize(
    ("given", "teaches"),
    [({}, False), ({"beta": 0.1}, True), ({"entropy_coef": 0.1}, True), ({"entropy_coef": 1}, True)],
)
def test_it_teaches_without_advantages_where_something_is_of_every_token(given, teaches):
    assert PolicyTerm(LossOptions(**given)).teaches(None) == teaches


@pytest.mark.parametrize(
    ("given", "differs", "age", "correction", "reads_tied"),
    [
        ({}, None, 0, None, False),
        ({}, True, 0, "token_truncate", False),
        ({}, False, 0.5, "token_truncate", False),
        ({"importance_correction": "none"}, True, 1, None, False),
        ({"importance_correction": "sequence_mask"}, False, 0, "sequence_mask", False),
        ({"loss_type": "bnpo"}, False, 0, None, True),
        ({"top_entropy_quantile": 0.5}, False, 0, None, True),
        ({"beta": 0.1}, False, 0, None, True),
    ],
)
def test_what_is_settled_before_the_first_update(given, differs, age, correction, reads_tied):
    more = {} if differs is None else {"sampler_differs": differs}
    work = work_of(batch=SimpleNamespace(age=lambda version: age))
    work.likelihood = SimpleNamespace(reference=object(), entropy_grad=False)
    PolicyTerm(LossOptions(**given), **more).begin(work)
    assert work.fixed == {"policy": Settled(correction, reads_tied)}
    assert work.fixed["policy"].scale == 1


def test_what_is_settled_before_each_update():
    """Three of six tokens are read; the entropy of a mini-batch for company does not count."""
    entropies = [torch.tensor([[1.0, 9.0], [2.0, 9.0]]), torch.full((1, 2), 100.0)]
    masks = [torch.tensor([[True, False], [True, False]]), torch.ones(1, 2, dtype=torch.bool)]
    minis = [
        SimpleNamespace(loss_mask=mask, counts=counts, entropy=entropy)
        for mask, counts, entropy in zip(masks, (True, False), entropies, strict=True)
    ]
    likelihood = SimpleNamespace(replaying=nullcontext, forward=lambda mini: mini)
    rows = [PackedRow([1], [Sample(0, [2, 3, 4])])]
    for given, read, scale, top in (({}, rows, 2, None), ({}, [], 6, None), ({"top_entropy_quantile": 0.5}, [], 6, 1)):
        fixed = {"policy": Settled(None, False)}
        ranks = SimpleNamespace(gather=lambda entries: [entries])
        work = work_of(rows=read, fixed=fixed, minis=minis, likelihood=likelihood, ranks=ranks)
        PolicyTerm(LossOptions(**given)).before_update(work)
        assert fixed["policy"].scale == scale
        assert (fixed["policy"].top and (fixed["policy"].top.threshold.item(), fixed["policy"].top.tokens)) == (
            top and (1.5, 1)
        )


@pytest.mark.parametrize(
    ("given", "reads_entropy"),
    [
        ({}, False),
        ({"entropy_coef": 0.1, "mask_truncated_completions": True}, True),
        ({"top_entropy_quantile": 0.5}, True),
    ],
)
def test_what_the_loss_is_given_and_what_is_noted(monkeypatch, given, reads_entropy):
    """Log π_old is that of the first reading. Metrics that are means are scaled to the tokens of the step."""
    calls, notes = [], {}

    def policy_loss(*arguments, **named):
        calls.append((*arguments, named))
        return torch.tensor(7.0), {"loss/policy": torch.tensor(3.0), "policy/clip": 5.0}

    monkeypatch.setattr(policy, "policy_loss", policy_loss)
    mask, loss_mask = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    mini = SimpleNamespace(samples=[Sample(0, [4, 5], [-1.0, -3.0])], mask=mask, loss_mask=loss_mask)
    mini.sampling_logprobs = torch.tensor([[-1.0, -3.0, 0.0]])
    mini.advantages = torch.tensor([1.0])
    terms = [SimpleNamespace(advantages=lambda advantages, *given: 2 * advantages)]
    settled = Settled("token_mask", False, scale=2.0)
    likelihood = SimpleNamespace(of_reference=lambda mini: "reference")

    def note(name, value, factor=1.0):
        notes[name] = float(value) * factor

    work = work_of(fixed={"policy": settled}, terms=terms, likelihood=likelihood, note=note)
    options = LossOptions(**{"beta": 0.1 if reads_entropy else 0} | given)
    for logprobs in (torch.tensor([[-1.5, -1.0, 50.0]]), torch.zeros(1, 3)):
        forward = SimpleNamespace(logprobs=logprobs.requires_grad_(), entropy="entropy")
        assert PolicyTerm(options, longest=9).scalar(mini, forward, work) == 7
    masked = "mask_truncated_completions" in given
    assert notes == {"loss/policy": 3.0, "policy/clip": 10.0, FARTHEST: 0.5 if masked else 2.0}
    (first, advantages, used, passed, named), (second, *_) = calls
    assert (first.old.tolist(), second.old.tolist()) == ([[-1.5, -1.0, 50.0]],) * 2
    assert not first.old.requires_grad
    assert first.reference == ("reference" if reads_entropy else None)
    assert (advantages.tolist(), used is (loss_mask if masked else mask), passed) == ([2.0], True, options)
    assert (named["entropy"], named["correction"]) == ("entropy" if reads_entropy else None, "token_mask")
    assert named["step"] == (6, 2, 9, None)
