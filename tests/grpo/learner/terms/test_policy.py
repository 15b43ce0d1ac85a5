"""The policy term by hand: when it teaches, what it settles, and what it gives to the loss."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from grpo.config.loss import LossOptions
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.policy import PolicyTerm, Settled


def work_of(**given) -> SimpleNamespace:
    """Of a step of six tokens of two completions."""
    batch = SimpleNamespace(age=lambda version: 0.0, num_completion_tokens=6, num_samples=2)
    return SimpleNamespace(**{"batch": batch, "version": 1, "fixed": {}, "rows": [], "number": 0, "minis": []} | given)


@pytest.mark.parametrize(
    ("given", "teaches"),
    [({}, False), ({"beta": 0.1}, True), ({"entropy_coef": 0.1}, True)],
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
    PolicyTerm(LossOptions(**given), **more).begin_update(work)
    assert work.fixed == {"policy": Settled(correction, reads_tied)}
    assert work.fixed["policy"].scale == 1


def test_what_an_update_settles():
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
        settled = fixed["policy"].top
        assert (settled and (settled.threshold.item(), settled.tokens)) == (top and (pytest.approx(1.5, abs=1e-4), 1))
