"""What drafts gain, by the table of costs: rounds counted by hand."""

import doctest
from dataclasses import replace

import pytest
from engine_cases import PARAMS, completions, prompts_of

from policies.policy import Policy
from rollout import group
from rollout.depth import CostTable, draft_gain
from rollout.drafts.drafts import Drafts
from rollout.engine import Engine

FREE = replace(PARAMS, group_size=1, draft_tokens=None, max_completion_tokens=20, stop_token_ids=())


@pytest.fixture(scope="module")
def policy(taught_policy) -> Policy:
    return taught_policy()


def test_docstring_examples():
    assert doctest.testmod(group).failed == 0


def test_the_gain_is_what_tokens_cost_without_drafts_over_what_their_rounds_cost(policy):
    """A round of one row takes 10 ms, and 11 with a draft. First the head reads 12 tokens, .25 ms each."""
    costs = CostTable(rows=[1], rounds=[[10.0, 11.0]], reading=0.25)
    (one,) = completions(Engine(policy, costs=costs).sample(prompts_of(12), replace(FREE, temperature=0.0)))
    draft, drafted = one.draft, one.draft.drafted[0]
    assert 3 < drafted < draft.target_forwards < 19  # some drafts were accepted
    assert draft.cost == pytest.approx(11 * drafted + 10 * (draft.target_forwards - drafted) + 12 * 0.25)
    assert draft.plain_cost == pytest.approx(10 * 19)
    assert draft_gain([one]) == draft.plain_cost / draft.cost


def test_rounds_without_drafts_gain_nothing_and_lose_nothing(policy):
    dear = CostTable(rows=[1, 4], rounds=[[10.0, 30.0], [16.0, 60.0]])
    found = completions(Engine(policy, costs=dear).sample(prompts_of(12, 5), replace(FREE, group_size=2)))
    assert sum(draft.cost for draft in (one.draft for one in found)) == pytest.approx(19 * 16, abs=0.01)
    assert draft_gain(found) == 1
    fixed = completions(Engine(policy).sample(prompts_of(12), replace(FREE, draft_tokens=1)))
    assert draft_gain(fixed) is None


def test_a_prompt_that_joins_after_the_head_has_begun_is_read_at_once_and_counted(policy, monkeypatch):
    """Three prompts of 12 tokens for two rows, .01 ms to read a token; what rounds take is left out."""
    costs = CostTable(rows=[1, 2], rounds=[[10.0, 11.0]] * 2, reading=0.01)
    plain = Engine(policy).sample(prompts_of(12, 12, 12), replace(FREE, draft_tokens=0))
    _, *both = (one.token_ids for one in completions(plain))  # the last two are decoded first
    stop = next(token for token in both[0][4:] if token not in [*both[0][:4], *both[1]])
    begun, begin = [], Drafts.begin

    def noted(drafts, prefilled):
        begun.append(drafts.head.cache is not None)
        begin(drafts, prefilled)

    monkeypatch.setattr(Drafts, "begin", noted)
    monkeypatch.setattr(Drafts, "add_cost", lambda *given, **named: None)
    engine = Engine(policy, costs=costs, max_rows=2)
    found = completions(engine.sample(prompts_of(12, 12, 12), replace(FREE, stop_token_ids=(stop,))))
    assert begun == [False, True], "the third prompt joins a row that is decoded with drafts"
    assert sum(one.draft.cost for one in found) == pytest.approx(36 * 0.01, abs=0.002)
