"""Rows that wait, depths that change, drafts taken unverified, experts noted: the tokens stay what they are."""

import math
import random
from dataclasses import replace

import pytest
import torch
from engine_cases import PARAMS, PROMPTS, completions, prompts_of, tokens, unrolled_logits

import rollout.decoding.batch
import rollout.rows
from policies.decoding.absorbed import AbsorbedTrunk
from policies.routing.routers import RoutingRecorder
from rollout.cost_table import CostTable
from rollout.decoding.batch import Batch
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding
from rollout.drafts import head
from rollout.drafts.depth import DepthController
from rollout.drafts.drafts import Drafts
from rollout.faults import RolloutError
from rollout.group import Prompt
from rollout.pool import PoolOptions
from rollout.rows import Rows
from rollout.workers.local_pool import LocalPool


@pytest.fixture(scope="module")
def plain(policy) -> list[list[int]]:
    return tokens(Engine(policy).sample(PROMPTS, PARAMS))


# ---- prompts that are read together ----


def test_one_prefill_reads_prompts_of_like_length(policy, monkeypatch):
    """One long prompt among short ones is read alone, so that little is padding; all that fit are read at once."""
    lengths, read = [120, 118, 30, 29, 28, 27, 10], []
    forward = AbsorbedTrunk.__call__
    monkeypatch.setattr(
        AbsorbedTrunk, "__call__", lambda trunk, ids, *rest: read.append(ids.shape) or forward(trunk, ids, *rest)
    )
    monkeypatch.setattr(rollout.decoding.batch, "CPU_PREFILL_TOKENS", 400)
    prompts = [Prompt(str(i), "", [2 + (i + j) % 9 for j in range(n)]) for i, n in enumerate(lengths)]
    Decoding(Batch(Engine(policy).decoder, prompts, replace(PARAMS, group_size=1)))
    assert [tuple(shape) for shape in read] == [(2, 120), (4, 30), (1, 10)]


# ---- rows that wait ----


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("max_rows", [pytest.param(1, marks=pytest.mark.slow), 8, 13])
def test_contract_4_rows_that_waited_get_the_same_tokens(policy, plain, max_rows, draft_tokens, group_size):
    params = replace(PARAMS, draft_tokens=draft_tokens, group_size=group_size)
    expected = plain[:: PARAMS.group_size // group_size]
    assert tokens(Engine(policy, max_rows=max_rows).sample(PROMPTS, params)) == expected


def test_finished_rows_leave_and_waiting_ones_take_their_places(policy, plain):
    engine = Engine(policy, max_rows=16)
    with torch.inference_mode():
        batch, seen = Batch(engine.decoder, PROMPTS, replace(PARAMS, draft_tokens=2)), []
        decoding = Decoding(batch)
        while not decoding.done:
            seen.append((batch.counts.alive, len(batch.waiting)))
            decoding.decode_round()
    assert seen[0] == (16, 4)
    assert max(alive for alive, _ in seen) <= 16
    waiting = [count for _, count in seen]
    assert waiting == sorted(waiting, reverse=True)
    refills = [i for i in range(1, len(seen)) if waiting[i] < waiting[i - 1]]
    assert len(refills) >= 2
    assert all(seen[i][0] > 4 for i in refills)  # beside rows that were still going on
    assert tokens(batch.groups()) == plain


def test_a_row_ends_with_the_last_token_that_its_limit_allows(random_policy):
    """The prompt gives the first token and each forward one more. It takes no forward to see that there is no room."""
    params = replace(PARAMS, stop_token_ids=(), max_completion_tokens=5, draft_tokens=0)
    with torch.inference_mode():
        batch, left = Batch(Engine(random_policy(11)).decoder, PROMPTS[:2], params), []
        decoding = Decoding(batch)
        for _ in range(4):  # and not until it is done, which would be never
            left.append(decoding.done)
            decoding.decode_round()
    assert left == [False] * 4
    assert decoding.done
    assert {len(ids) for ids in tokens(batch.groups())} == {5}


# ---- depths that change ----

CHEAP = CostTable(rows=[1], rounds=[[1.0, 1.01, 1.02, 1.03, 1.04]])


def test_contract_3_any_sequence_of_depths_gives_the_same_tokens(policy, plain, monkeypatch):
    """0 included, also for a long time at first, so that the head has much to read when it drafts at last."""
    for pattern in ([0, 3, 0, 0, 1, 4], [0] * 12 + [2, 0, 4], [4, 0], [0, 1]):
        asked = []

        def choose(controller, rows, most, pattern=pattern, asked=asked):
            asked.append(min(pattern[len(asked) % len(pattern)], most))
            return (asked[-1], 2.0) if asked[-1] else (0, 1.0)

        monkeypatch.setattr(DepthController, "choose", choose)
        groups = Engine(policy, costs=CHEAP).sample(PROMPTS, replace(PARAMS, draft_tokens=None))
        assert tokens(groups) == plain
        assert len(set(asked)) > 1
        late = [c for c in completions(groups) if len(c.token_ids) > 25]
        assert sum(sum(c.draft.accepted) for c in late) > 0


def test_the_head_begins_once_the_time_lost_without_it_is_what_reading_takes(policy, monkeypatch):
    """One row, a prompt of 12 tokens, 1 ms to read each. A round of one draft takes 11 ms instead of 10 for 1.75 tokens
    instead of 1, so 26/7 ms a token are lost: 12 ms after four rounds."""
    depths, plan = [], Drafts.plan

    def noted(drafts, *rest):
        depths.append(plan(drafts, *rest))
        return depths[-1]

    monkeypatch.setattr(Drafts, "plan", noted)
    costs = CostTable(rows=[1], rounds=[[10.0, 11.0]], reading=1.0)
    params = replace(PARAMS, group_size=1, draft_tokens=None, stop_token_ids=())
    engine = Engine(policy, costs=costs)
    found = tokens(engine.sample(prompts_of(12), params))
    assert depths[:8] == [0] * 4 + [1] * 4
    assert found == tokens(Engine(policy).sample(prompts_of(12), replace(params, draft_tokens=0)))
    depths.clear()
    engine.costs = replace(costs, reading=0.0)
    engine.sample(prompts_of(12), params)
    assert depths[0] == 1


@torch.inference_mode()
def test_graphs_with_drafts_wait_too_and_caches_are_no_longer_than_they_need(policy):
    """1 and 2.734 tokens in 2 and 3 ms lose .903 ms a token. To read 12 tokens takes 3 ms: after four rounds."""
    costs = CostTable([1], [[10.0] * 9], graphs=[[2.0, 2.5, 9.0, 3.0]], reading=0.25)
    params = replace(PARAMS, group_size=1, draft_tokens=None, compiled=True)
    decoder = Engine(policy, costs=costs).decoder
    batch = Batch(decoder, prompts_of(12), params)
    batch.admit_waiting()
    assert [batch.drafts.of_graph(batch.live) for _ in range(6)] == [0] * 4 + [3, 0]  # nothing was read: again
    assert batch.room == params.max_completion_tokens + 4
    assert Batch(decoder, prompts_of(12), replace(params, compiled=False)).room == 49


@torch.inference_mode()
def test_the_head_is_given_what_each_row_has_unread_in_order(policy):
    """Rows that left give it nothing, also where another row has their index now; nor do tokens that were not kept."""
    drafter = Batch(Engine(policy).decoder, prompts_of(12), replace(PARAMS, draft_tokens=3)).drafts.head
    assert drafter is not None

    def rows(*index: int) -> Rows:
        which = torch.tensor(index)
        return Rows.start(which, torch.zeros(len(index), 2, dtype=torch.int32), which, since=drafter.number)

    def keep(live: Rows, *tokens: list[int], kept: list[int]) -> None:
        ids = torch.tensor(tokens)
        drafter.add_unread(live, ids, ids[..., None].float(), torch.tensor(kept))

    def taken(live: Rows, width: int) -> list[list[int]]:
        ids, states = drafter.take_unread(live, width)
        assert ids.shape[1] == width
        assert torch.equal(states[..., 0], ids.float())
        return [row[:count] for row, count in zip(ids.tolist(), live.unread.tolist(), strict=True)]

    first = rows(0, 1, 2)
    keep(first, [1], [2], [3], kept=[1, 1, 1])
    keep(first, [4, 5, 0, 0, 0], [6, 7, 7, 7, 7], [8, 9, 0, 0, 0], kept=[2, 5, 1])
    left = first.select(torch.tensor([2, 0]))  # 1 leaves
    drafter.select(left, torch.tensor([2, 0]))
    again = rows(1)
    keep(again, [10], kept=[1])
    live = Rows.concat([left, again])
    keep(live, [11, 12], [13, 14], [15, 16], kept=[1, 2, 1])
    assert taken(live, 5) == [[3, 8, 11], [1, 4, 5, 13, 14], [10, 15]]
    live.unread = torch.zeros_like(live.unread)
    keep(live, [17, 18], [19, 20], [21, 22], kept=[2, 1, 1])
    assert taken(live, 3) == [[17, 18], [19], [21]]
    live.unread = torch.zeros_like(live.unread)
    for number in (26, 29):
        keep(live, [number], [number + 1], [number + 2], kept=[1, 1, 1])
    assert taken(live, 2) == [[26, 29], [27, 30], [28, 31]]
    live.unread = torch.zeros_like(live.unread)
    keep(live, [23], [24], [25], kept=[1, 0, 1])
    assert taken(live.select(torch.tensor([2, 0])), 1) == [[25], [23]]
    assert drafter.unread == []


@torch.inference_mode()
def test_what_only_rows_that_left_had_is_forgotten(policy):
    """Others join where a quarter of the places is free, so that a shard that never drafts would hold ever more."""
    dear = CostTable(rows=[1], rounds=[[1.0, 9.0]])
    params = replace(PARAMS, group_size=1, draft_tokens=None)
    batch = Batch(Engine(policy, max_rows=4, costs=dear).decoder, prompts_of(*[12] * 24), params)
    decoding, most, total = Decoding(batch), 0, 0
    while not decoding.done:
        decoding.decode_round()
        held = sum(part.tokens_RS.numel() for part in batch.drafts.head.unread)
        most = max(most, held - head.MOST_HELD * int(batch.live.unread.sum()))
        total += batch.counts.alive
    assert total > 300
    assert most <= 16  # a few rounds of four rows


LONG = pytest.param([8], 0.5, marks=pytest.mark.long)


@pytest.mark.parametrize("group_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("pattern", "share"),
    [pytest.param([8] * 4 + [0] * 25 + [8], 0.0, marks=pytest.mark.slow), ([0, 8, 0, 0, 5], 0.1), LONG],
)
def test_rows_that_end_far_apart_leave_each_others_entries_alone(policy, monkeypatch, group_size, pattern, share):
    """Some rows accept every draft and end early, the others a `share` of them, and drafting pauses meanwhile.
    The head then reads more tokens of a late row than an early row has room for. Every draft of a row that goes on is
    still what the unrolled head says."""
    rng = random.Random(0)
    prompts = prompts_of(*(rng.randrange(12, 20) for _ in range(32 // group_size)))
    params = replace(PARAMS, stop_token_ids=(), group_size=group_size, draft_tokens=None)
    token_ids = tokens(Engine(policy).sample(prompts, replace(params, draft_tokens=0)))
    early = rng.sample(range(32), 3)  # fewer than the eighth of the batch at which ended rows leave
    asked, calls, logits, draft, pick = [], [], [], head.Drafter.draft, head.pick

    def choose(controller, rows, most):
        calls.append(min(pattern[len(calls) % len(pattern)], most))
        return (calls[-1], 2.0) if calls[-1] else (0, 1.0)

    def pick_token(logits_RV, *rest):
        logits.append(logits_RV)
        return pick(logits_RV, *rest)

    def draft_and_change(self, live, depth, noise, temperature):
        """Notes the head's drafts; what is verified instead is right for early rows, and a share of the others."""
        logits.clear()
        drafts, confident = draft(self, live, depth, noise, temperature)
        changed = drafts.clone()
        for r in live.alive.nonzero()[:, 0].tolist():
            row, count = int(live.index[r]), int(live.count[r])
            asked.append((row, count, drafts[r].tolist(), torch.stack([step[r] for step in logits])))
            right = token_ids[row][count : count + depth]
            changed[r, : len(right)] = torch.tensor(right)
            if row not in early and rng.random() >= share:
                changed[r, 0] = (changed[r, 0] + 1) % 250
        return changed, confident

    monkeypatch.setattr(DepthController, "choose", choose)
    monkeypatch.setattr(head, "pick", pick_token)
    monkeypatch.setattr(head.Drafter, "draft", draft_and_change)
    engine = Engine(policy, costs=CostTable(rows=[1], rounds=[[1.0] * 9]))
    assert tokens(engine.sample(prompts, params)) == token_ids
    for row, count, drafts, said in asked[:: 1 + len(asked) // 60] + asked[-10:]:
        expected = unrolled_logits(policy, prompts[row // group_size], token_ids[row][:count], drafts)
        torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_rows", [8, 256])
def test_contract_3_the_controllers_depths_give_the_same_tokens(policy, plain, max_rows):
    engine = Engine(policy, max_rows=max_rows, costs=CHEAP)
    groups = engine.sample(PROMPTS, replace(PARAMS, draft_tokens=None))
    assert tokens(groups) == plain
    assert sum(c.draft.target_forwards for c in completions(groups)) < sum(map(len, plain)) - len(plain)
    assert groups == Engine(policy, max_rows=max_rows, costs=CHEAP).sample(PROMPTS, replace(PARAMS, draft_tokens=None))


def test_where_drafts_cost_too_much_none_are_made(policy, plain):
    costs = CostTable(rows=[1], rounds=[[1.0, 9.0, 17.0]])
    groups = Engine(policy, costs=costs).sample(PROMPTS, replace(PARAMS, draft_tokens=None))
    assert tokens(groups) == plain
    assert sum(sum(c.draft.drafted) for c in completions(groups)) == 0


@pytest.mark.slow
def test_costs_are_measured_once_and_kept(policy):
    engine = Engine(policy)
    engine.sample(PROMPTS, replace(PARAMS, draft_tokens=None, max_completion_tokens=4))
    costs = engine.costs
    assert costs.rows == [1, 2, 4, 8, 16, 24, 32]
    assert all(len(rounds) >= 2 and min(rounds) > 0 for rounds in costs.rounds)
    engine.sample(PROMPTS, replace(PARAMS, draft_tokens=None, max_completion_tokens=4))
    engine.sync_weights(policy.weights(), 1)
    assert engine.costs is costs


# ---- accept: margin ----


def test_margin_takes_clear_drafts_unverified_and_counts_the_others(policy):
    params = replace(PARAMS, draft_tokens=3, accept="margin", stop_token_ids=())
    never = completions(Engine(policy).sample(PROMPTS, replace(params, margin=1e9)))
    assert [c.token_ids for c in never] == tokens(Engine(policy).sample(PROMPTS, replace(params, accept="exact")))
    assert all(c.draft.fallbacks >= c.draft.target_forwards - 1 and sum(c.draft.accepted) == 0 for c in never)
    always = completions(Engine(policy).sample(PROMPTS, replace(params, margin=0.0)))
    assert all(c.draft.fallbacks == 0 and c.draft.accepted == c.draft.drafted for c in always)
    assert [c.token_ids for c in always] != [c.token_ids for c in never]
    some = completions(Engine(policy).sample(PROMPTS, replace(params, margin=1.0)))
    assert 0 < sum(c.draft.fallbacks for c in some) < sum(c.draft.target_forwards for c in some)


# ---- experts ----


@torch.no_grad()
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_the_experts_noted_are_those_the_stock_model_uses(policy, draft_tokens):
    engine = Engine(policy, max_rows=9)
    groups = engine.sample(PROMPTS, replace(PARAMS, draft_tokens=draft_tokens, record_routing=True))
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
            with RoutingRecorder(policy.trunk) as recorder:
                policy.trunk(ids, use_cache=False)
            used = torch.stack(recorder.experts, dim=1).sort(-1).values  # [T, MoE layers, k]
            length = len(group.prompt.token_ids)
            assert torch.equal(group.prompt_routing.sort(-1).values.long(), used[:length])
            assert torch.equal(completion.routing.sort(-1).values.long()[:-1], used[length:-1])
            assert completion.routing.shape == used[length:].shape


def test_the_last_token_of_a_completion_has_no_experts(policy):
    """It is never read for its own sake: what was read in its place is a draft, or it again after its row had ended."""
    engine = Engine(policy, max_rows=9, costs=CHEAP)
    for change in ({"draft_tokens": 8}, {"draft_tokens": None}, {"max_completion_tokens": 1}):
        for group in engine.sample(PROMPTS, replace(PARAMS, record_routing=True, **change)):
            assert (group.prompt_routing >= 0).all()
            for completion in group.completions:
                assert (completion.routing[-1] == -1).all()
                assert (completion.routing[:-1] >= 0).all()


# ---- failures ----


def test_what_is_not_finite_is_marked_and_the_rest_is_not_lost(random_policy):
    policy = random_policy(1)
    healthy = tokens(Engine(policy).sample(PROMPTS, PARAMS))
    with torch.no_grad():
        policy.trunk.get_input_embeddings().weight[PROMPTS[2].token_ids[0]] = math.nan
    touched = PROMPTS[2].token_ids[0]
    with pytest.raises(RolloutError, match=r"not finite.*'p/2'") as caught:
        Engine(policy).sample(PROMPTS, PARAMS)
    found = completions(caught.value.groups)
    assert len(found) == len(healthy) == 32
    for i, (completion, ids) in enumerate(zip(found, healthy, strict=True)):
        if touched in PROMPTS[i // 4].token_ids + ids[:-1]:
            assert completion.finish_reason == "abort"
            assert completion.token_ids == ids[: len(completion.token_ids)]  # what came before is good
        else:
            assert completion.token_ids == ids
    assert sum(c.finish_reason != "abort" for c in found) >= 16


def test_a_prompt_that_cannot_be_continued_costs_no_other_one(policy, plain):
    prompts = [*PROMPTS[:3], Prompt("empty", "", []), *PROMPTS[3:], Prompt("long", "", [5] * 250)]
    for sampler in (Engine(policy), LocalPool(policy, PoolOptions(prompts_per_shard=3))):
        with pytest.raises(RolloutError, match=r"(?s)'empty' has no tokens.*'long' has 250 tokens") as caught:
            sampler.sample(prompts, PARAMS)
        assert [group.prompt for group in caught.value.groups] == PROMPTS
        assert tokens(caught.value.groups) == plain


@pytest.mark.slow
def test_weights_that_are_not_finite_are_told_of_also_where_costs_are_measured_first(random_policy):
    policy = random_policy(1)
    with torch.no_grad():
        policy.trunk.model.norm.weight.fill_(math.nan)
    engine = Engine(policy)
    with pytest.raises(RolloutError, match="not finite for completions of 2 of 2 prompts"):
        engine.sample(PROMPTS[:2], replace(PARAMS, draft_tokens=None))
    assert engine.costs.max_depth > 0
