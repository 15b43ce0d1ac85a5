"""From scores to advantages, and from groups to rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.config.loss import LossOptions
from grpo.learner.prepare import estimate, pack, recorded, supervised, tokens_in_loss
from grpo.learner.row import PackedRow, Sample
from policies.files.atomic import write_file
from rewards.group_score import GroupScore
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup

OWN = b"""
from grpo import advantage

@advantage
def late(rewards_PG, lengths_PG, parts):
    return rewards_PG[..., None] * parts["r"][..., None].expand(-1, -1, int(lengths_PG.max()))
"""


def test_contract_6_marks_of_a_sample_that_was_dropped_count_in_no_mean():
    """One function failed on the second sample, and the other's mark of it stays in the record. Without it each of the
    two rewards is ±1/√2 after normalisation, their sums ±√2, and those ±1/√2 again."""
    score = GroupScore([2.0, None, 0.0], {"right": [1.0, 1.0, 0.0], "short": [1.0, None, 0.0]})
    loss = LossOptions(multi_objective_aggregation="normalize_then_sum")
    advantages, tied = estimate([score], loss, {"right": 1.0, "short": 1.0})
    assert advantages[0].tolist() == pytest.approx([2**-0.5, 0.0, -(2**-0.5)], abs=1e-3)
    assert tied.tolist() == [False]


def test_advantages_by_token_may_be_tensors():
    """Of each completion, or padded to [P, G, T]."""
    completions = [Completion([5] * n, [-0.5] * n, "", "stop", 0, DraftStats()) for n in (2, 3)]
    groups, scores = [RolloutGroup(Prompt("p", "?", [1]), completions)], [GroupScore([1.0, 0.0], {})]
    by_token = [[[0.5, 1.0], [-0.5, 0.25, 1.0]]]
    padded = torch.tensor([[[0.5, 1.0, 9.0], [-0.5, 0.25, 1.0]]])
    options = {"max_tokens": 64, "routing_replay": False, "mask_truncated": False}
    rows = [
        pack(groups, scores, advantages, torch.zeros(1, dtype=torch.bool), **options).rows
        for advantages in (by_token, [[torch.tensor(each) for each in by_token[0]]], padded)
    ]
    assert rows[0] == rows[1] == rows[2]
    assert [sample.token_advantages for sample in rows[0][0].samples] == by_token[0]
    of_completions = [[torch.tensor(0.5), torch.tensor(-0.5)]]
    [row] = pack(groups, scores, of_completions, torch.zeros(1, dtype=torch.bool), **options).rows
    assert [sample.advantage for sample in row.samples] == [0.5, -0.5]


def test_marks_of_a_loops_own_have_one_sum():
    """They have no parts by reward."""
    loss = LossOptions(multi_objective_aggregation="normalize_then_sum")
    advantages, tied = estimate([GroupScore([1.0, 0.0], {})], loss, {"r": 1.0})
    assert advantages[0].tolist() == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-3)
    assert tied.tolist() == [False]


def test_each_estimator_by_hand(tmp_path):
    """Of 1 and 0: the group's mean is ½ and its spread √½; the batch's are 3/4 and ½, and centred 0 and √(1/6)."""
    scores = [GroupScore([1.0, 1.0], {"r": [2.0, 4.0]}), GroupScore([1.0, 0.0], {"r": [3.0, 5.0]})]
    found = {
        name: estimate(scores, LossOptions(advantage=name), {})[0][1].tolist()
        for name in ("group_relative", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    }
    for name, first, second in (
        ("group_relative", 0.5**0.5, -(0.5**0.5)),
        ("rloo", 1, -1),
        ("reinforce_plus_plus", 0.5, -1.5),
        ("reinforce_plus_plus_baseline", 1.5**0.5, -(1.5**0.5)),
    ):
        assert found[name] == pytest.approx([first, second], abs=1e-3), name
    write_file(tmp_path / "own.py", OWN)
    own = LossOptions(advantage=f"{tmp_path}/own.py:late")
    assert estimate(scores, own, {}, [[1, 2], [2, 1]])[0] == [[[2.0], [4.0, 4.0]], [[3.0, 3.0], [0.0]]]
    assert estimate(scores[:1], own, {})[0] == [[[2.0], [4.0]]], "of one token where no lengths are given"


def test_groups_become_rows_with_their_prompt_once():
    def completion(ids, reason="stop", version=1, **more):
        draft, routing = DraftStats(cost=2.0, plain_cost=3.0), torch.tensor(ids)[:, None, None]
        return Completion(ids, [-float(i) for i in ids], "", reason, version, draft=draft, routing=routing, **more)

    groups = [
        RolloutGroup(Prompt("a", "", [7]), [completion([1, 2]), completion([3, 4])], torch.tensor([[[7]]])),
        RolloutGroup(
            Prompt("b", "", [8, 9]),
            [completion([5, 6, 7], versions=[1, 1, 2], sampled=[True, False, True]), completion([8], "length", 4)],
            torch.tensor([[[8]], [[9]]]),
        ),
    ]
    scores = [GroupScore([1.0, None], {}), GroupScore([0.0, 1.0], {})]
    options = {"max_tokens": 99, "routing_replay": True, "mask_truncated": True}
    batch = pack(groups, scores, torch.tensor([[0.5, 0.0], [-1.0, 1.0]]), torch.tensor([True, False]), **options)
    first, second = batch.rows
    assert (first.prompt_token_ids, second.prompt_token_ids, first.group, second.group) == ([7], [8, 9], 0, 1)
    told = [
        (s.index, s.token_ids, s.advantage, s.token_advantages, s.in_loss) for row in batch.rows for s in row.samples
    ]
    assert told == [(0, [1, 2], 0.5, [], True), (2, [5, 6, 7], -1.0, [], True), (3, [8], 1.0, [], False)]
    assert (second.samples[0].sampled, second.samples[0].sampling_logprobs) == ([True, False, True], [-5, -6, -7])
    assert (second.prompt_routing.flatten().tolist(), second.samples[1].routing.tolist()) == ([8, 9], [[[8]]])
    assert (batch.num_samples, batch.num_completion_tokens, batch.tied_groups, batch.step) == (3, 2 + 2, 1, 0)
    assert batch.draft_gain == 1.5
    assert batch.tokens_by_version == {1: 2 + 2 + 2, 2: 1, 4: 1}
    assert batch.age(3) == (2 * 6 + 1 * 1 + 0 * 1) / 8
    assert replace(batch, tokens_by_version={0: 1}).age(1) == 1
    assert batch != replace(batch)
    by_token = [[(0.1, 0.2), (0.0, 0.0)], [(1.0, 2.0, 3.0), (4.0,)]]
    batch = pack(groups, scores, by_token, torch.tensor([True, False]), **options | {"mask_truncated": False})
    told = [(sample.advantage, sample.token_advantages) for row in batch.rows for sample in row.samples]
    assert told == [(0.0, [0.1, 0.2]), (0.0, [1.0, 2.0, 3.0]), (0.0, [4.0])]
    assert (batch.advantages, batch.num_completion_tokens) == ([[list(of) for of in group] for group in by_token], 5)
    groups[0].prompt_routing = None
    pack(groups, scores, by_token, torch.tensor([True, False]), **options | {"routing_replay": False})
    with pytest.raises(ValueError, match="recorded no experts or attention heads for prompt 'a'; set it to false"):
        pack(groups, scores, by_token, torch.tensor([True, False]), **options)


def test_solutions_and_lessons_have_no_advantage_and_each_solution_is_a_group():
    batch = supervised([PackedRow([5], [Sample(0, [1, 2])]), PackedRow([6], [Sample(0, [3])])])
    assert ([row.group for row in batch.rows], batch.num_samples, batch.num_completion_tokens) == ([0, 1], 2, 3)
    assert (batch.advantages.tolist(), batch.step, batch.tied_groups, batch.seconds) == ([[0.0], [0.0]], 0, 0, 0)
    assert tokens_in_loss(batch.rows) == 3
    batch = recorded([SimpleNamespace(tokens=3), SimpleNamespace(tokens=4)])
    assert (batch.rows, batch.num_samples, batch.num_completion_tokens, batch.step) == ([], 0, 7, 0)
    assert batch.advantages.shape == (0, 1)
