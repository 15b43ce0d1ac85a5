"""The seam of the loss: terms that a user writes, adds or leaves out, and the primitives that a step is made of."""

import copy
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from recorded import groups_of
from small_learner import assert_close, gradients_of, last_work, learner_of, same, snapshot, watched

from grpo.config.balance import BalanceOptions
from grpo.config.features import Feature
from grpo.config.learner import LearnerOptions
from grpo.learner import build
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.parallel import ONE_PROCESS
from grpo.learner.prepare import recorded
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.terms.term import Term

BOTH = {"balance": BalanceOptions(bias_rate=0.01), "mtp": 1.0, "depth": 2}


small = partial(learner_of, learning_rate=1e-2, tokens_per_micro_batch=40)


def batch_of(learner: Learner, seed: int = 5, tied: bool = False):
    groups, scores = groups_of(3, seed)
    for score in scores if tied else ():
        score.rewards[:] = [1.0] * 3
    return learner.prepare(groups, scores, step=1)


class Confidence(Term):
    """That of the docstring of Term."""

    name = "confidence"

    def per_token(self, mini, forward, work):
        return 0.5 * forward.logprobs.exp()


class Number(Term):
    """A summand of this size in each micro-batch, and notes of it; `needs` and `teaches` as it is told."""

    def __init__(self, size: float | None, **given) -> None:
        self.size = size
        self.__dict__ |= {name: value for name, value in given.items() if name not in ("needs", "teaches")}
        self.needs = lambda row, work: given.get("needs", False)
        self.teaches = lambda batch: given.get("teaches", False)

    def scalar(self, mini, forward, work):
        work.note(f"seen/{work.number}", 1)
        work.note("seen/all", 2)
        work.note("seen_max", (4, 6, 5)[work.number])
        return None if self.size is None else self.size * (forward.logprobs.sum() / forward.logprobs.sum().detach())


def learner_with(policy, *terms: Term, **options) -> Learner:
    options = LearnerOptions(**{"learning_rate": 1e-9, "max_grad_norm": 1e9, "tokens_per_micro_batch": 40} | options)
    return watched(Learner(policy, options, terms, Likelihood(policy)))


@pytest.fixture
def ticks(monkeypatch):
    """The clock of the learner, which goes on by a second whenever it is read."""
    monkeypatch.setattr("grpo.learner.learner.time", SimpleNamespace(perf_counter=count(1).__next__))


@pytest.mark.usefixtures("ticks")
def test_summands_metrics_and_seconds_of_a_step_by_hand(micro_policy):
    """Two groups learn, and a tied one teaches a term that does not move the trunk: a micro-batch each."""
    terms = [Number(1), Number(None), Number(2, needs=True, moves_trunk=False), Number(4, in_total=False), Number(8)]
    learner = learner_with(micro_policy(0), *terms, updates_per_batch=2)
    (groups, scores), told = groups_of(3), []
    scores[1].rewards[:] = [1.0] * 3
    batch = replace(learner.prepare(groups, scores), seconds=10.0)
    assert batch.step == 0
    learner.policy_version = 3
    metrics = learner.step(batch, 7, on_micro_batch=lambda *read: told.append(read))
    assert told == [(number, 6) for number in range(1, 7)]
    sums = {name: value for name, value in metrics.items() if name.startswith(("seen", "loss", "mismatch", "time"))}
    assert sums == {
        "loss/total": 3 * (1 + 2),
        "mismatch/age_mean": 3,
        **{f"seen/{number}": 5 for number in range(3)},
        "seen/all": 3 * 5 * 2,
        "seen_max": 5 * 6,
        # the clock is read five times more in a backward pass, and once in an update and at the end
        "time/learn": 10 + 2 * (5 + 1) + 1,
    }
    work = last_work(learner)
    assert (work.batch.step, work.update, work.seconds_apart, work.minis) == (7, 2, 2, ())
    assert "policy/approx_kl" in metrics
    assert learner.updates == 2
    assert learner.forward_backward(batch)["loss/total"] == 9
    tied = replace(batch, rows=[replace(row, samples=[]) for row in batch.rows])
    learner.terms = [Number(1)]
    assert learner.step(tied)["time/learn"] == 11


def test_a_tied_batch_is_learned_from_where_one_term_of_several_teaches(micro_policy):
    learner = learner_with(
        micro_policy(0), Number(1), Number(2, needs=True, moves_trunk=False), Number(4, teaches=True)
    )
    assert learner.step(batch_of(learner, tied=True))["learner/updates"] == 1
    assert [row.learns for row in last_work(learner).rows] == [False] * 3
    learner.terms = [Number(1, needs=True), *learner.terms]
    assert learner.step(batch_of(learner, tied=True))["learner/updates"] == 1
    assert [row.learns for row in last_work(learner).rows] == [True] * 3


def test_a_loss_takes_the_place_of_the_first_term_alone(micro_policy):
    learner = learner_with(micro_policy(0), Number(1), Number(2), Number(4))
    batch, other = batch_of(learner), Number(8)
    totals = [learner.forward_backward(batch, loss)["loss/total"] for loss in (None, other, None, other)]
    assert totals == [3 * 7, 3 * 14] * 2
    assert len(learner.waiting) == 2


def test_a_rank_with_fewer_micro_batches_reads_the_shortest_row_for_company(micro_policy):
    learner = learner_with(micro_policy(0), Number(1))
    batch = batch_of(learner)
    rows = [replace(batch.rows[0], samples=batch.rows[0].samples[:1]), *batch.rows[1:]]
    learner.ranks = SimpleNamespace(share=lambda rows, reader=1: rows[reader::2], reader=1, readers=2)
    [own, company] = learner._shared(rows)
    assert ([own.counts, company.counts], own.rows, company.rows) == ([True, False], rows[1:2], rows[:1])
    learner.ranks, learner._shared = ONE_PROCESS, lambda rows: iter([company])
    assert "loss/total" not in learner.forward_backward(batch)
    assert not any(gradient.any() for gradient in gradients_of(learner.policy).values())


def test_lessons_are_read_by_the_terms_that_learn_from_them_alone(micro_policy):
    class Reader(Term):
        reads_lessons = True

        def lesson(self, lesson, work):
            work.note("seen", lesson.tokens)
            return learner.policy.lm_head.sum()

    learner = learner_with(micro_policy(0), Number(1), Reader())
    metrics = learner.step(recorded([SimpleNamespace(tokens=3), SimpleNamespace(tokens=4)]), 2)
    assert metrics["seen"] == 7
    assert learner.policy.lm_head.grad.unique().tolist() == [2.0]
    assert {"learner/updates", "policy/approx_kl"}.isdisjoint(metrics)
    assert learner.policy_version == 0


def test_a_users_term_adds_its_gradient_and_no_other(micro_policy, monkeypatch):
    plain = small(micro_policy(0))
    file = SimpleNamespace(term=lambda policy, config, load: Confidence())
    monkeypatch.setitem(sys.modules, "grpo.learner.terms.confidence", file)
    monkeypatch.setattr(build, "FEATURES", (Feature("confidence", term=True), *build.FEATURES))
    learner, by_hand = small(micro_policy(0)), micro_policy(0)
    [before, after] = [each.forward_backward(batch_of(each)) for each in (plain, learner)]
    groups, loss = groups_of(3)[0], 0.0
    for group in groups:
        for completion in group.completions:
            start, ids = len(group.prompt.token_ids), torch.tensor([group.prompt.token_ids + completion.token_ids])
            logits = by_hand.trunk(input_ids=ids).logits[0, start - 1 : -1]
            loss = loss + 0.5 * logits.softmax(-1).gather(-1, ids[0, start:, None]).sum()
    loss = loss / sum(len(completion.token_ids) for group in groups for completion in group.completions)
    loss.backward()
    assert after["loss/total"] - before["loss/total"] == pytest.approx(loss.item(), abs=1e-5)
    parts, whole = gradients_of(plain.policy), gradients_of(learner.policy)
    expected = {name: p.grad for name, p in by_hand.named_parameters() if p.grad is not None}
    assert len(expected) > 10
    assert_close(whole, {name: part + expected.get(name, 0.0) for name, part in parts.items()}, 1e-4)
    assert max((whole[name] - parts[name]).abs().max().item() for name in expected) > 1e-4


@pytest.mark.parametrize(
    ("name", "given"), [("balance", {"balance": BalanceOptions(bias_rate=0.1)}), ("draft_head", {"mtp": 1.0})]
)
def test_a_term_that_is_not_in_the_table_is_not_there(micro_policy, monkeypatch, name, given):
    assert name in {term.name for term in small(micro_policy(0), **given).terms}
    monkeypatch.setattr(build, "FEATURES", tuple(feature for feature in build.FEATURES if feature.name != name))
    learner = small(micro_policy(0), **given)
    assert name not in {term.name for term in learner.terms}
    metrics = learner.step(batch_of(learner))
    assert metrics["learner/updates"] == 1
    assert not [key for key in metrics if key.startswith({"balance": "moe/", "draft_head": "loss/mtp"}[name])]


@pytest.mark.parametrize(("name", "advantage"), [("value", "gae"), ("value", "rank_softmax"), ("distill", "distill")])
def test_an_estimator_whose_term_is_not_there_is_refused_by_name(micro_policy, monkeypatch, name, advantage):
    given = {"advantage": advantage, "teacher": micro_policy(1)}
    assert name in {term.name for term in small(micro_policy(0), **given).terms}
    monkeypatch.setattr(build, "FEATURES", tuple(feature for feature in build.FEATURES if feature.name != name))
    with pytest.raises(ValueError, match=rf"loss\.advantage={advantage}: no term of the loss estimates it; use .*rloo"):
        small(micro_policy(0), **given)


def test_gradients_add_up_until_the_optimizer_takes_them(micro_policy):
    learner = small(micro_policy(0), **BOTH)
    learner.step(batch_of(learner, seed=1))  # there is momentum
    before, batches = snapshot(learner), [batch_of(learner, seed) for seed in (2, 3)]
    alone = []
    for batch in batches:
        other = small(copy.deepcopy(learner.policy), **BOTH)
        other.policy_version = 1
        other.forward_backward(batch)
        alone.append(gradients_of(other.policy))
    for batch in batches:
        learner.forward_backward(batch)
    assert_close(gradients_of(learner.policy), {name: alone[0][name] + alone[1][name] for name in alone[0]}, 1e-4)
    assert same(snapshot(learner), before)
    assert learner.policy_version == 1
    assert learner.optim_step()["learner/updates"] == 1
    moved = snapshot(learner)
    assert not same(moved, before)
    assert learner.optim_step() == {}
    assert learner.forward_backward(batch_of(learner, tied=True))["learner/updates"] == 0
    assert learner.optim_step() == {}
    assert same(snapshot(learner), moved)
    assert learner.policy_version == 2


def test_a_batch_that_is_counted_twice_is_one_update(micro_policy):
    once, twice = (small(micro_policy(0)) for _ in range(2))
    once.forward_backward(batch_of(once))
    batch = batch_of(twice)
    for _ in range(2):
        twice.forward_backward(batch)
    expected = {name: 2 * gradient for name, gradient in gradients_of(once.policy).items()}
    assert_close(gradients_of(twice.policy), expected, 1e-4)
    assert twice.optim_step()["learner/updates"] == 1


@pytest.mark.parametrize("updates", [1, 2])
def test_the_same_batch_after_an_update_goes_on_from_the_policy_before_it(micro_policy, updates):
    """By hand, and as a step: the same bits. What the learner's own steps would do has no say in it."""
    whole = small(micro_policy(0), updates_per_batch=2, **BOTH)
    by_hand = small(micro_policy(0), updates_per_batch=updates, **BOTH)
    expected, batch = whole.step(batch_of(whole)), batch_of(by_hand)
    metrics = by_hand.forward_backward(batch) | by_hand.optim_step()
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    metrics |= by_hand.forward_backward(batch) | by_hand.optim_step()
    assert metrics["policy/ratio_mean"] != pytest.approx(1.0, abs=1e-6)
    metrics |= by_hand.finish(batch.works)
    assert same(snapshot(whole), snapshot(by_hand))
    assert last_work(whole).policy_logprobs == last_work(by_hand).policy_logprobs != {}
    timeless = [{n: v for n, v in each.items() if not n.startswith("time/")} for each in (metrics, expected)]
    assert timeless[0] == timeless[1]
    assert metrics["learner/updates"] == 2
    assert by_hand.policy_version == 1


@pytest.mark.parametrize("raising", ["term", "on_micro_batch"])
def test_an_exception_in_the_middle_leaves_no_gradient(micro_policy, monkeypatch, raising):
    learner, undisturbed = (small(micro_policy(0), **BOTH) for _ in range(2))
    learner.forward_backward(batch_of(learner))  # whose gradient goes, too
    calls, scalar = [], PolicyTerm.scalar

    def fails(*arguments):
        calls.append(any(p.grad is not None for p in learner.policy.parameters()))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scalar(*arguments) if by_caller is None else None

    batch, by_caller = batch_of(learner, 2), fails if raising == "on_micro_batch" else None
    with monkeypatch.context() as patch:
        patch.setattr(PolicyTerm, "scalar", fails if raising == "term" else scalar)
        with pytest.raises(KeyboardInterrupt):
            learner.forward_backward(batch, on_micro_batch=by_caller)
    assert calls == [True, True]
    assert gradients_of(learner.policy) == {}
    assert learner.optim_step() == {}
    for each in (learner, undisturbed):
        each.step(batch_of(each, 3))
    assert same(snapshot(learner), snapshot(undisturbed))


def test_a_state_that_is_loaded_knows_no_batch(micro_policy):
    learner = small(micro_policy(0), **BOTH)
    tensors, state = copy.deepcopy(learner.state())
    assert tensors.keys() == {"policy", "optimizer"}
    batch, metrics = batch_of(learner), []
    for _ in range(2):
        metrics.append(learner.step(batch))
        learner.forward_backward(batch)
        learner.optimizer.state.clear()
        learner.load_state(tensors, state)
        assert gradients_of(learner.policy) == {}
        assert learner.optim_step() == {}
    timeless = [{n: v for n, v in each.items() if not n.startswith("time/")} for each in metrics]
    assert timeless[0] == timeless[1]
    assert timeless[0]["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_the_version_moves_once_a_step_and_again_where_it_was_published(micro_policy):
    learner = small(micro_policy(0), updates_per_batch=3)
    learner.step(batch_of(learner))
    assert learner.policy_version == 1
    learner.weights()  # between two steps
    batch, versions = batch_of(learner), []
    for published in (False, True, False):
        learner.forward_backward(batch)
        learner.optim_step()
        versions.append(learner.policy_version)
        if published:
            learner.weights()
    assert versions == [2, 2, 3]
