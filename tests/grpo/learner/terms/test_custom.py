"""Losses of a caller's own: what `as_term` makes of them, what a function of tokens reads, and one of whole texts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from recorded import groups_of
from small_learner import assert_close as close_to
from small_learner import gradients_of

from grpo.config.learner import LearnerOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.row import Sample
from grpo.learner.terms.custom import NAME, OfAll, PerToken, as_term
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.terms.supervised import SupervisedTerm
from grpo.learner.terms.term import Term
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup, Segment

OPTIONS = LearnerOptions(learning_rate=1e-3, max_grad_norm=1e9, tokens_per_micro_batch=40)


def learner_of(policy, loss: LossOptions | None = None, *, reference=None, **more) -> Learner:
    """Its first term is the policy loss of these options."""
    loss = loss or LossOptions()
    likelihood = Likelihood(policy, reference=reference)
    return Learner(policy, OPTIONS, [PolicyTerm(loss, **more)], likelihood, loss=loss)


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return gradients_of(learner.policy.trunk)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    close_to(one, other, 1e-4)
    assert any(gradient.any() for gradient in other.values())


def logprobs_by_hand(policy, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The log-probability of each token of a completion, by the stock model."""
    logits = policy.trunk(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def truncated_groups() -> tuple[list[RolloutGroup], list[GroupScore]]:
    """Two groups of three; a limit has cut the second completion of the first one."""
    groups, scores = groups_of(2)
    groups[0].completions[1] = replace(groups[0].completions[1], finish_reason="length")
    return groups, scores


# ---- a loss of ours, by its name or by its options -------------------------------------------------------------------


@pytest.mark.parametrize("by", ["name", "options"])
def test_contract_8_a_loss_by_its_name_corrects_what_another_engine_has_sampled(micro_policy, by):
    """What sampled is still another engine, and the length limit still the run's: both are the learner's to know."""
    options = LossOptions(loss_type="dr_grpo")
    plain, given = (learner_of(micro_policy(0), options, sampler_differs=True, longest=99) for _ in range(2))
    groups, scores = groups_of(3)
    expected = plain.forward_backward(plain.prepare(groups, scores))
    loss = as_term("dr_grpo" if by == "name" else options, given.terms[0])
    metrics = given.forward_backward(given.prepare(groups, scores), loss)
    assert metrics["loss/policy"] == expected["loss/policy"] != 0
    assert {name for name in metrics if name.startswith("mismatch/")} == {
        name for name in expected if name.startswith("mismatch/")
    }
    assert_close(gradients(given), gradients(plain))
    same = learner_of(micro_policy(0), options, sampler_differs=False, longest=99)
    same.forward_backward(same.prepare(groups, scores))
    far = max((gradients(same)[name] - of).abs().max().item() for name, of in gradients(plain).items())
    assert far > 1e-4, "the correction changes nothing here, so this test would not see that it is lost"


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_loss_of_all_completions_is_refused_where_one_of_them_was_left_out(micro_policy, with_reference):
    """The others would move up: DPO over completions 0 and 1, 2 and 3 would compare 0 with 2."""
    learner = learner_of(micro_policy(0), reference=micro_policy(0))
    groups, scores = groups_of(2)
    scores[1].rewards[0] = None
    batch = learner.prepare(groups, scores)
    with pytest.raises(ValueError, match="group 1, sample 0 has no reward, or no tokens, and so no place in the batch"):
        learner.forward_backward(batch, OfAll(lambda *lists: lists[0][0].sum(), with_reference=with_reference))
    assert not batch.works
    learner.forward_backward(batch)  # the configured loss needs no pairs


def test_options_of_a_loss_are_those_of_the_batch_or_its_own():
    """Truncated completions are masked as the batch was prepared. Beside gold solutions a loss has its own options."""
    first, options = PolicyTerm(LossOptions(mask_truncated_completions=True)), LossOptions(beta=0.25)
    term = as_term("grpo", first)
    assert (term.options.loss_type, term.options.mask_truncated_completions) == ("grpo", True)
    assert as_term(LossOptions(mask_truncated_completions=True), first).options.mask_truncated_completions
    with pytest.raises(ValueError, match=r"=False: .* by loss\.mask_truncated_completions=True; set it"):
        as_term(LossOptions(), first)
    term = as_term(options, SupervisedTerm())
    assert isinstance(term, PolicyTerm)
    assert (term.options, term.sampler_differs, term.longest) == (options, False, None)


def test_a_function_is_read_by_how_many_parameters_it_needs():
    first = PolicyTerm(LossOptions())
    term = SupervisedTerm()
    assert as_term(term, first) is term
    assert isinstance(as_term("supervised", first), SupervisedTerm)
    assert isinstance(as_term(lambda a, b, c, d, e=0: a, first), PerToken)
    for function, with_reference in ((lambda a: a, False), (lambda a, k=1: a, False), (lambda a, b: a, True)):
        term = as_term(function, first)
        assert isinstance(term, OfAll)
        assert term.with_reference == with_reference
    for function in (lambda: 0, lambda a, b, c: a, lambda a, b, c, d, e: a):
        with pytest.raises(ValueError, match="a loss of [035] parameters"):
            as_term(function, first)


# ---- of each token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [True, False])
def test_a_function_of_tokens_sees_no_truncated_completion_where_these_are_masked(micro_policy, masks):
    """A function that divides by the tokens of its mask divides by those in the loss."""
    learner = learner_of(micro_policy(0), LossOptions(mask_truncated_completions=masks))
    groups, scores = truncated_groups()
    counted: list[int] = []

    def loss(logprobs, sampling_logprobs, advantages, mask):
        counted.append(int(mask.sum()))
        return -logprobs

    learner.forward_backward(learner.prepare(groups, scores), as_term(loss, learner.terms[0]))
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    assert sum(counted) == sum(lengths) - masks * lengths[1]


def test_a_loss_of_tokens_is_the_mean_over_those_in_the_loss(micro_policy):
    """By hand, from what sampled and the advantage of each token's completion."""
    policy, by_hand = micro_policy(0), micro_policy(0)
    learner = learner_of(policy, LossOptions(mask_truncated_completions=True))
    groups, scores = truncated_groups()
    given = [[0.5, 2.0, -1.0], [0.0, 0.25, 3.0]]
    batch = learner.prepare(groups, scores, given)

    def loss(logprobs, sampling_logprobs, advantages, mask):
        assert logprobs.shape == sampling_logprobs.shape == advantages.shape == mask.shape
        return -advantages * (logprobs - sampling_logprobs).exp()

    metrics = learner.forward_backward(batch, PerToken(loss))
    total, tokens = torch.zeros(()), 0
    for group, row in zip(groups, given, strict=True):
        for completion, advantage in zip(group.completions, row, strict=True):
            if completion.finish_reason == "length":
                continue
            logprobs = logprobs_by_hand(by_hand, group.prompt.token_ids, completion.token_ids)
            total = total - (advantage * (logprobs - torch.tensor(completion.logprobs)).exp()).sum()
            tokens += len(completion.token_ids)
    (total / tokens).backward()
    assert metrics[NAME] == metrics["loss/total"] == pytest.approx(total.item() / tokens, rel=1e-4)
    expected = {name: p.grad for name, p in by_hand.trunk.named_parameters() if p.grad is not None}
    assert_close(gradients(learner), expected)


@pytest.mark.parametrize("loss", [lambda a, b, c, d: -a, lambda a: -torch.cat(list(a)).sum()])
def test_a_loss_of_ones_own_teaches_where_every_advantage_is_zero(micro_policy, loss):
    learner = learner_of(micro_policy(0))
    groups, scores = groups_of(2)
    batch = learner.prepare(groups, scores, [[0.0] * 3] * 2)
    assert learner.forward_backward(batch)["learner/updates"] == 0
    learner.forward_backward(batch, as_term(loss, learner.terms[0]))
    assert learner.optim_step()["learner/updates"] == 1


# ---- of all completions at once --------------------------------------------------------------------------------------


class Weights(Term):
    """Hand-written: the sum of w · log p with a weight for each token of each completion."""

    name = "weights"

    def __init__(self, by_index: dict[int, torch.Tensor]) -> None:
        self.by_index = by_index

    def needs(self, row, work):
        return True

    def teaches(self, batch):
        return True

    def scalar(self, mini, forward, work):
        rows = [self.by_index[s.index][s.start : s.start + len(s.token_ids)].tolist() for s in mini.samples]
        return (mini.padded(rows) * forward.logprobs * mini.mask).sum()


def episodes() -> tuple[list[RolloutGroup], list[GroupScore]]:
    """Two episodes of an agent that has rewritten its context, in two and three segments, and a plain completion. Of
    the second one the middle segment follows the prompt of the group, so that its row comes before that of the first
    segment."""
    first = [Segment(0, [5, 9, 17]), Segment(3, [5, 9, 17, 21, 4, 8, 30])]
    second = [Segment(0, [6, 2]), Segment(2, [5, 9, 17]), Segment(6, [11, 12, 13, 14, 15])]
    lengths = {7: first, 8: second, 4: []}
    completions = [
        Completion([40 + 3 * i + t for t in range(n)], [-2.0] * n, "", "stop", 0, segments=segments)
        for i, (n, segments) in enumerate(lengths.items())
    ]
    return [RolloutGroup(Prompt("a", "", [5, 9, 17]), completions)], [GroupScore([1.0, 0.0, 0.5], {})]


def weighted(lists) -> torch.Tensor:
    """Every token of every completion has a weight that no other one has."""
    return sum(((1 + i + 0.1 * torch.arange(len(of))) * of).sum() for i, of in enumerate(lists))


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_loss_of_all_weighs_each_token_of_each_segment(micro_policy, with_reference):
    """The function gets whole completions, [Lc] each, whatever rows their segments stand in, and so does the
    reference's list; its gradient reaches the token that it belongs to."""
    policy, reference = micro_policy(0), micro_policy(1)
    learner = learner_of(policy, LossOptions(beta=0.1), reference=reference)
    groups, scores = episodes()
    batch = learner.prepare(groups, scores)
    seen: list[list[list[float]]] = []

    def own(logprobs):
        seen.append([of.tolist() for of in logprobs])
        return weighted(logprobs)

    def against(logprobs, of_reference):
        seen.append([of.tolist() for of in of_reference])
        return own(logprobs)

    metrics = learner.forward_backward(batch, as_term(against if with_reference else own, learner.terms[0]))
    [group] = groups
    for source, lists in zip([reference, policy] if with_reference else [policy], seen, strict=True):
        for completion, values in zip(group.completions, lists, strict=True):
            parts = completion.parts(group.prompt)
            with torch.no_grad():
                by_hand = [logprobs_by_hand(source, prompt, completion.token_ids[at]) for prompt, at in parts]
            assert values == pytest.approx(torch.cat(by_hand).tolist(), abs=1e-4)
    assert metrics[NAME] == pytest.approx(weighted([torch.tensor(of) for of in seen[-1]]).item(), rel=1e-5)
    plain = learner_of(micro_policy(0))
    weights = {i: 1 + i + 0.1 * torch.arange(len(c.token_ids)) for i, c in enumerate(group.completions)}
    plain.forward_backward(plain.prepare(groups, scores), Weights(weights))
    assert_close(gradients(learner), gradients(plain))


def test_a_loss_of_all_gives_no_gradient_to_completions_that_it_leaves_out(micro_policy):
    """Best of n reads some completions only; and a number that it counts is counted once, not in each micro-batch."""
    learner, plain = learner_of(micro_policy(0)), learner_of(micro_policy(0))
    groups, scores = groups_of(3)
    batch = learner.prepare(groups, scores)
    loss = as_term(lambda logprobs: -logprobs[4].sum(), learner.terms[0])
    metrics = learner.forward_backward(batch, loss)
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    weights = {i: torch.full((n,), -1.0 if i == 4 else 0.0) for i, n in enumerate(lengths)}
    plain.forward_backward(plain.prepare(groups, scores), Weights(weights))
    assert_close(gradients(learner), gradients(plain))
    with torch.no_grad():
        by_hand = logprobs_by_hand(micro_policy(0), groups[1].prompt.token_ids, groups[1].completions[1].token_ids)
    assert len(learner.waiting[0].minis) > 1
    assert metrics[NAME] == pytest.approx(-by_hand.sum().item(), rel=1e-4)


def test_contract_14_a_loss_of_all_gives_no_gradient_to_what_a_tool_wrote(micro_policy):
    """Whatever the function makes of the zeros that stand for these tokens: here an infinite gradient."""
    learner, plain = learner_of(micro_policy(0)), learner_of(micro_policy(0))
    groups, scores = groups_of(1)
    [group] = groups
    sampled = [[t not in (1, 2) for t, _ in enumerate(c.token_ids)] for c in group.completions]
    of_tools = zip(group.completions, sampled, strict=True)
    group.completions[:] = [replace(completion, sampled=own) for completion, own in of_tools]
    weights: dict[int, torch.Tensor] = {}

    def loss(logprobs):
        for i, (of, own) in enumerate(zip(logprobs, sampled, strict=True)):
            weights[i] = torch.where(torch.tensor(own), 1 / of.detach(), 0.0)
        return sum((-of).log().sum() for of in logprobs)

    learner.forward_backward(learner.prepare(groups, scores), OfAll(loss, with_reference=False))
    plain.forward_backward(plain.prepare(groups, scores), Weights(weights))
    assert_close(gradients(learner), gradients(plain))


def test_a_loss_of_all_is_worked_out_anew_before_each_update(micro_policy):
    learner = learner_of(micro_policy(0))
    batch = learner.prepare(*groups_of(2))
    seen: list[float] = []

    def loss(logprobs):
        seen.append(torch.cat(list(logprobs)).sum().item())
        return -torch.cat(list(logprobs)).sum()

    term = as_term(loss, learner.terms[0])
    for _ in range(2):
        learner.forward_backward(batch, term)
        learner.optim_step(1e-2)
    assert seen[1] > seen[0] + 0.1


def test_a_loss_against_the_reference_needs_one(micro_policy):
    learner = learner_of(micro_policy(0))
    batch, loss = learner.prepare(*groups_of(2)), as_term(lambda policy, reference: policy[0].sum(), learner.terms[0])
    with pytest.raises(ValueError, match=r"there is no reference: set lora, .* or loss\.beta above 0"):
        learner.forward_backward(batch, loss)
    learner.policy.add_lora(2, 4.0, ["o_proj"])
    adapted = learner_of(learner.policy)
    assert NAME in adapted.forward_backward(batch, loss)  # its base is the reference


def test_its_value_is_noted_once_in_a_step_on_one_rank_alone():
    """Metrics are summed over micro-batches and ranks, and each of them knows the whole value."""
    term, noted = OfAll(lambda logprobs: logprobs[0].sum(), with_reference=False), []
    one = Sample(0, [4, 5])
    mini = SimpleNamespace(samples=[one], mask=torch.ones(1, 2, dtype=torch.bool), padded=torch.tensor)
    for reader, number in ((0, 0), (0, 1), (1, 0)):
        work = SimpleNamespace(number=number, ranks=SimpleNamespace(reader=reader))
        work.fixed = {term.name: ({(0, 0): [0.5, 2.0]}, 7.0)}
        work.note = lambda name, value, at=(reader, number): noted.append((at, name, value))
        loss = term.scalar(mini, SimpleNamespace(logprobs=torch.tensor([[-1.0, -3.0]])), work)
        assert loss.item() == -6.5
    assert noted == [((0, 0), NAME, 7.0)]
