"""Completions that go on by a budget of tokens (rollout.partial): the same tokens while the weights stay the same."""

from dataclasses import replace

import pytest
import torch
from engine_cases import PARAMS, PROMPTS, completions, taught, tokens

from policies.policy import Policy
from rollout.continued import Begun, go_on, joined
from rollout.engine import Engine
from rollout.group import Completion, DraftStats, RolloutGroup
from rollout.pool import LocalPool

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy(random_policy) -> Policy:
    return taught(random_policy(11, attention_bias=True), 0.8, steps=5)


def begun(prompts, params=PARAMS) -> list[Begun]:
    return [Begun(params, RolloutGroup(prompt, [])) for prompt in prompts]


def budget_for(pool, going, budget, policy) -> tuple[list[RolloutGroup], list[Begun]]:
    """The groups that are complete, and what goes on."""
    going = go_on(pool, going, budget, policy.tokenizer)
    return [each.group for each in going if not each.unfinished], [each for each in going if each.unfinished]


def all_of(pool, going, budget, policy) -> tuple[list[RolloutGroup], int]:
    """The groups in the order of their prompts, and after how many budgets the last one was complete."""
    found, calls = [], 0
    while going:
        whole, going = budget_for(pool, going, budget, policy)
        found, calls = found + whole, calls + 1
    order = [prompt.prompt_id for prompt in PROMPTS]
    return sorted(found, key=lambda group: order.index(group.prompt.prompt_id)), calls


@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("budget", [1, 7, 1000])
def test_contract_4_with_the_same_weights_parts_are_the_whole(policy, budget, draft_tokens):
    params = replace(PARAMS, draft_tokens=draft_tokens, step=3)
    expected = Engine(policy).sample(PROMPTS, params)
    groups, calls = all_of(LocalPool(policy, torch.float32, 3), begun(PROMPTS, params), budget, policy)
    assert calls == min(-(-40 // budget), 40)
    assert tokens(groups) == tokens(expected)
    for part, whole in zip(completions(groups), completions(expected), strict=True):
        assert part.logprobs == pytest.approx(whole.logprobs, abs=2e-5)
        assert (part.text, part.finish_reason) == (whole.text, whole.finish_reason)
        assert part.versions == []


def test_groups_of_several_draws_go_on_together_and_none_waits_for_another(policy):
    pool = LocalPool(policy, torch.float32, 3)
    first, second = (replace(PARAMS, step=step) for step in (1, 2))
    whole, going = budget_for(pool, begun(PROMPTS[:3], first), 4, policy)
    assert len(whole) + len(going) == 3
    assert {len(c.token_ids) for each in going for c in each.group.completions if each.goes_on(c)} == {4}
    finished, going = [whole], [*going, *begun(PROMPTS[3:5], second)]
    while going:
        whole, going = budget_for(pool, going, 4, policy)
        finished.append(whole)
    expected = {
        (params.step, group.prompt.prompt_id): tokens([group])
        for params, prompts in ((first, PROMPTS[:3]), (second, PROMPTS[3:5]))
        for group in Engine(policy).sample(prompts, params)
    }
    found = {group.prompt.prompt_id: tokens([group]) for whole in finished for group in whole}
    assert found == {prompt_id: ids for (_, prompt_id), ids in expected.items()}


def test_every_token_has_the_version_that_sampled_it(policy, random_policy):
    """After new weights, what was there stays, and the rest has their log-probabilities."""
    pool, other = LocalPool(policy, torch.float32, 3), random_policy(11, attention_bias=True)
    params = replace(PARAMS, max_completion_tokens=17)
    _, going = budget_for(pool, begun(PROMPTS, params), 4, policy)
    before = [list(c.token_ids) for each in going for c in each.group.completions]
    pool.publish(other.weights(), 7)
    assert going
    changed, going = budget_for(pool, going, 13, policy)
    assert not going
    for former, completion in zip(before, completions(changed), strict=True):
        assert completion.token_ids[: len(former)] == former
        more = len(completion.token_ids) - len(former)
        assert completion.version_of_tokens == [0] * len(former) + [7] * more
        assert completion.policy_version == (7 if more else 0)
        assert completion.versions == ([0] * len(former) + [7] * more if more else [])
    long = next(group for group in changed if any(c.versions for c in group.completions))
    completion = next(c for c in long.completions if c.versions)
    rows = torch.tensor([long.prompt.token_ids + completion.token_ids])
    with torch.no_grad():
        scores = [
            (p.trunk(input_ids=rows).logits[0, len(long.prompt.token_ids) - 1 : -1] / params.temperature)
            .log_softmax(-1)
            .gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            for p in (policy, other)
        ]
    cut = completion.versions.count(0)
    expected = torch.cat([scores[0][:cut], scores[1][cut:]])
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_two_parts_are_one_completion(policy):
    def part(ids, version, **given):
        return Completion(ids, [-0.5] * len(ids), "", "length", version, **given)

    first = part([5, 6], 2, draft=DraftStats(1, [1], [1], depths=[0, 1]), routing=torch.tensor([[[3]], [[-1]]]))
    more = part([7, 8, 9], 4, draft=DraftStats(2, [2, 1], [0, 0], 1, depths=[0, 0, 0]), routing=torch.ones(3, 1, 1))
    both = joined(first, more, policy.tokenizer)
    assert (both.token_ids, both.versions, both.policy_version) == ([5, 6, 7, 8, 9], [2, 2, 4, 4, 4], 4)
    assert both.draft == DraftStats(4, [3, 1], [1, 0], 1, depths=[0, 1, 0, 0, 0])
    assert both.text == policy.tokenizer.decode([5, 6, 7, 8, 9])
    assert both.routing.flatten().tolist() == [3, -1, 1, 1, 1]
