"""Completions that begin alike are decoded as one row, and no token changes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_cases import PARAMS, PROMPTS, completions, tokens

from policies.decoding.absorbed import AbsorbedTrunk
from rollout.decoding.batch import Batch
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding
from rollout.decoding.shared_rows import first_of, parted
from rollout.drafts.drafts import Drafts


@pytest.fixture
def rows_read(monkeypatch) -> list[int]:
    """How many rows each forward of the trunk has read, prompts included."""
    read, forward = [], AbsorbedTrunk.__call__
    monkeypatch.setattr(
        AbsorbedTrunk, "__call__", lambda trunk, ids, *rest: read.append(len(ids)) or forward(trunk, ids, *rest)
    )
    return read


def decoded(engine, params, shares):
    batch = Batch(engine.decoder, PROMPTS, params, shares=shares)
    decoding = Decoding(batch)
    while not decoding.done:
        decoding.decode_round()
    return batch.groups()


def rows(last, alive):
    return SimpleNamespace(last=torch.tensor(last), alive=torch.tensor(alive))


def test_rows_part_where_they_choose_different_tokens():
    place, parents = parted(torch.tensor([0, 0, 0, 1, 1]), rows([5, 9, 5, 7, 7], [True] * 5))
    assert (place.tolist(), parents.tolist()) == ([0, 1, 0, 2, 2], [0, 0, 1])
    assert first_of(place, torch.ones(5).bool()).tolist() == [0, 1, 3]


def test_what_has_ended_asks_for_no_row():
    place, parents = parted(torch.tensor([0, 0, 1]), rows([5, 9, 7], [True, False, False]))
    assert (parents.tolist(), place.tolist()) == ([0], [0, 0, 0])
    place, parents = parted(torch.tensor([0, 1, 0, 2]), rows([5, 9, 6, 7], [True, False, True, True]))
    assert torch.tensor([0, 0, 1])[parents][place].tolist() == [0, 0, 0, 1]  # prompts: their rows are neighbours
    place, parents = parted(torch.tensor([0, 1]), rows([5, 9], [False, False]))
    assert (place.tolist(), parents.tolist()) == ([0, 1], [0, 1])


@pytest.mark.parametrize(("max_rows", "temperature"), [(256, 1.0), (12, 0.3)])
def test_contract_4_shared_rows_change_no_token(policy, temperature, max_rows):
    params = replace(PARAMS, temperature=temperature, draft_tokens=0, group_size=6)
    engine = Engine(policy, max_rows=max_rows)
    alone, shared = (decoded(engine, params, shares) for shares in (False, True))
    assert tokens(shared) == tokens(alone)
    for one, other in zip(completions(alone), completions(shared), strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-5)
        assert other.finish_reason == one.finish_reason


def test_a_group_that_agrees_is_one_row_in_an_engine_too(policy, rows_read):
    """At a temperature of almost nothing all six completions of a prompt are the same."""
    params = replace(PARAMS, temperature=1e-4, draft_tokens=0, group_size=6)
    groups = decoded(Engine(policy), params, shares=True)
    assert all(len({tuple(c.token_ids) for c in group.completions}) == 1 for group in groups)
    Engine(policy).sample(PROMPTS, params)
    assert max(rows_read) <= len(PROMPTS)


def test_contract_3_rows_part_for_good_before_they_draft(policy, monkeypatch):
    """Two rounds without drafts, then two drafts in every round: the tokens are those without any."""
    plan, rounds = Drafts.plan, []
    monkeypatch.setattr(
        Drafts, "plan", lambda self, *rest: rounds.append(0) or (plan(self, *rest) if len(rounds) > 2 else 0)
    )
    engine, params = Engine(policy), replace(PARAMS, draft_tokens=2, group_size=6, temperature=0.5)
    drafted = decoded(engine, params, shares=True)
    assert sum(sum(c.draft.accepted) for c in completions(drafted)) > 0
    rounds.clear()
    assert tokens(drafted) == tokens(decoded(engine, replace(params, draft_tokens=0), shares=False))


def test_the_routing_of_shared_rows_is_that_of_each(policy):
    params = replace(PARAMS, temperature=0.3, draft_tokens=0, group_size=6, record_routing=True)
    alone, shared = (decoded(Engine(policy), params, shares) for shares in (False, True))
    for one, other in zip(completions(alone), completions(shared), strict=True):
        assert torch.equal(one.routing, other.routing)


def test_contract_3_a_prompt_whose_rows_have_all_ended_disturbs_no_other(policy, monkeypatch):
    """Its rows are still there when drafts begin: the others attend to their own prompts."""
    plan, depth = Drafts.plan, [0]
    monkeypatch.setattr(Drafts, "plan", lambda self, *rest: plan(self, *rest) if depth[0] else 0)
    monkeypatch.setattr(Batch, "retire_ended", lambda self: self.count_rows())  # nothing leaves
    engine, params = Engine(policy), replace(PARAMS, draft_tokens=2, group_size=6, temperature=1.0)
    expected = tokens(decoded(engine, replace(params, draft_tokens=0), shares=False))
    for ended in (0, 1, 2):
        depth[0] = 0
        batch = Batch(engine.decoder, PROMPTS, params, shares=True)
        decoding = Decoding(batch)
        rows = range(6 * ended, 6 * ended + 6)
        batch.results.stopped[list(rows)] = True
        batch.count_rows()
        for _ in range(3):  # others part meanwhile
            decoding.decode_round()
        depth[0] = 1
        while not decoding.done:
            decoding.decode_round()
        others = [i for i in range(len(expected)) if i not in rows]
        sampled = tokens(batch.groups())
        assert [sampled[i] for i in others] == [expected[i] for i in others]
