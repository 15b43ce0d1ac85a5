"""What drafts gain, by the table of costs: rounds counted by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_cases import PARAMS, completions, prompts_of

from rollout.cost_table import CostTable
from rollout.decoding.batch import Batch
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding
from rollout.draft_stats import draft_gain
from rollout.drafts.depth import Patience
from rollout.drafts.drafts import Drafted, Drafts
from rollout.drafts.head import MOST_HELD, Drafter
from rollout.group import Completion, DraftStats, RolloutGroup
from rollout.rows import Prefilled, Rows

FREE = replace(PARAMS, group_size=1, draft_tokens=None, max_completion_tokens=20, stop_token_ids=())


def test_the_gain_is_what_tokens_cost_without_drafts_over_what_their_rounds_cost(policy):
    """A round of one row takes 10 ms, and 11 with a draft. First the head reads 12 tokens, .25 ms each."""
    costs = CostTable(rows=[1], rounds=[[10.0, 11.0]], reading=0.25)
    (one,) = completions(Engine(policy, costs=costs).sample(prompts_of(12), replace(FREE, temperature=0.0)))
    draft, drafted = one.draft, one.draft.drafted[0]
    assert 3 < drafted < draft.target_forwards < 19  # some drafts were accepted
    assert draft.cost == pytest.approx(11 * drafted + 10 * (draft.target_forwards - drafted) + 12 * 0.25)
    assert draft.plain_cost == pytest.approx(10 * 19)
    assert draft_gain([one]) == draft.plain_cost / draft.cost


def test_a_prompt_that_joins_after_the_head_has_begun_is_read_at_once_and_counted(policy, monkeypatch):
    """Three prompts of 12 tokens for two rows, .01 ms to read a token; what rounds take is left out."""
    costs = CostTable(rows=[1, 2], rounds=[[10.0, 11.0]] * 2, reading=0.01)
    plain = Engine(policy).sample(prompts_of(12, 12, 12), replace(FREE, draft_tokens=0))
    _, *both = (one.token_ids for one in completions(plain))  # the last two are decoded first
    stop = next(token for token in both[0][4:] if token not in [*both[0][:4], *both[1]])
    begun, begin = [], Drafts.add_prompts

    def noted(drafts, prefilled):
        begun.append(drafts.head.cache is not None)
        begin(drafts, prefilled)

    monkeypatch.setattr(Drafts, "add_prompts", noted)
    monkeypatch.setattr(Drafts, "add_cost", lambda *given, **named: None)
    engine = Engine(policy, costs=costs, max_rows=2)
    found = completions(engine.sample(prompts_of(12, 12, 12), replace(FREE, stop_token_ids=(stop,))))
    assert begun == [False, True], "the third prompt joins a row that is decoded with drafts"
    assert sum(one.draft.cost for one in found) == pytest.approx(36 * 0.01, abs=0.002)


class Head:
    """A draft head that notes what it is asked; it has missed eight tokens."""

    def __init__(self, *given) -> None:
        self.given, self.asked, self.cache = given, [], None
        self.missed = lambda live: 8

    def __getattr__(self, name):
        return lambda *given: self.asked.append((name, given)) or given[:2]


DEEP = CostTable(rows=[1], rounds=[[10.0, 11.0, 12.0, 13.0, 14.0]], reading=0.25)
SHALLOW = replace(DEEP, rounds=[[10.0, 11.0, 12.0]])


def got(drafted=0, kept=(), accepted=()) -> SimpleNamespace:
    """What rows got of a round, as far as drafts are told of it."""
    drafts = Drafted(torch.zeros(len(kept), drafted)) if drafted else None
    return SimpleNamespace(drafted=drafts, kept=torch.tensor(kept), accepted=torch.tensor(accepted))


@pytest.fixture
def drafts_of(monkeypatch):
    monkeypatch.setattr("rollout.drafts.drafts.Drafter", Head)

    def make(draft_tokens=None, costs=None, head=True, compiled=False) -> Drafts:
        decoder = SimpleNamespace(head=head or None, costs=costs, trunk=SimpleNamespace(device=torch.device("cpu")))
        return Drafts(decoder, replace(FREE, draft_tokens=draft_tokens, compiled=compiled), longest=7)

    return make


@pytest.mark.parametrize(
    ("given", "depth", "has_head"),
    [
        ((2,), 2, True),
        ((1, DEEP), 1, True),
        ((0,), 0, False),
        ((2, None, False), 2, False),
        ((None, DEEP), 4, True),
        ((None, DEEP, True, True), 3, True),
        ((None, SHALLOW, True, True), 2, True),
        ((None, DEEP, False), 0, False),
        ((None,), 0, False),
    ],
)
def test_what_can_be_drafted(drafts_of, given, depth, has_head):
    drafts = drafts_of(*given)
    assert (drafts.max_depth, drafts.fixed, bool(drafts.head)) == (depth, given[0] is not None, has_head)
    assert drafts.controller.costs is (given[1] if given[0] is None and len(given) > 1 else None)
    assert drafts.room == 20 + depth + 1
    assert drafts.cost == drafts.plain_cost == 0
    if drafts.head:
        assert drafts.head.given[2:] == (drafts.room, 7, depth + 1)
    else:
        drafts.add_prompts(None)
        drafts.add_verified(None, None, None, None)
        drafts.catch_up(None, False)
        assert (drafts.of_graph(None), drafts.plan(None, 1, 9)) == (0, 0)


def test_the_plan_of_a_fixed_number(drafts_of):
    drafts = drafts_of(2)
    assert [drafts.plan(None, 1, most) for most in (-1, 0, 1, 2, 9)] == [0, 0, 1, 2, 2]
    assert drafts_of(0).plan(None, 1, 9) == drafts_of().plan(None, 1, 9) == 0
    assert drafts.of_graph(None) == 2
    drafts.observe(None, 1, got(drafted=2))


@pytest.mark.parametrize(
    ("depth", "missed", "reads", "planned"), [(3, 0, False, 3), (3, 8, True, 3), (3, 8, False, 0), (0, 8, True, 0)]
)
def test_a_plan_waits_until_reading_what_was_missed_is_worth_it(drafts_of, depth, missed, reads, planned):
    """Tokens take 4 ms without drafts and 2 with them, and to read a missed one takes .25 ms."""
    drafts, asked = drafts_of(None, DEEP), []
    drafts.reading = SimpleNamespace(over=lambda *given: asked.append(given) or reads)
    drafts.head.missed = lambda live: missed
    speeds = {0: 0.25, 3: 0.5} if depth else {0: 0.5, 3: 0.25}
    drafts.controller = SimpleNamespace(
        choose=lambda alive, most: (depth, 0.5), plain=lambda alive: 0.25, graph_speeds=lambda rows: speeds, costs=DEEP
    )
    live = SimpleNamespace(index=[0])
    assert (drafts.plan(live, 1, 9), drafts.of_graph(live)) == (planned, planned)
    assert asked == ([(2.0, 2.0)] * 2 if depth and missed else [])


def test_costs_and_calls_of_a_shard_by_hand(drafts_of):
    """Eight missed tokens take 2 ms, and a prompt of six that joins later 1.5."""
    drafts, live, prompts = drafts_of(None, DEEP), object(), SimpleNamespace(token_ids_PT=torch.zeros(2, 3))
    head = drafts.head
    drafts.add_prompts(prompts)
    assert drafts.cost == 0
    head.cache = "cache"
    drafts.add_prompts(prompts)
    drafts.add_verified(live, "tokens", "hidden", "kept")
    former = drafts.reading
    assert drafts.draft(live, 2, "noise", 0.5) == Drafted(live, 2)
    assert drafts.reading is not former
    assert isinstance(drafts.reading, Patience)
    drafts.catch_up(live, fits=True)
    assert head.asked[-1][0] == "draft"
    drafts.catch_up(live, fits=False)
    assert head.asked == [
        ("add_prompts", (prompts,)),
        ("add_prompts", (prompts,)),
        ("add_unread", (live, "tokens", "hidden", "kept")),
        ("draft", (live, 2, "noise", 0.5)),
        ("read_ahead", (live,)),
    ]
    assert drafts.cost == 1.5 + 3 * 2
    drafts.add_cost(2, got(kept=[1, 1]), False)
    assert (drafts.cost, drafts.plain_cost) == (17.5, 10)
    drafts.add_cost(2, got(drafted=3, kept=[4, 2]), False)
    assert (drafts.cost, drafts.plain_cost) == (30.5, 40)  # three tokens of each row in 13 ms
    drafts.add_cost(1, got(kept=[1]), True)
    assert drafts.cost == float("inf"), "graphs were not measured"
    many = drafts_of(None, CostTable([1, 128, 256], [[1, 1.1], [9, 12], [15]]))
    many.add_cost(130, got(drafted=1, kept=[2] * 130), False)
    assert math.isfinite(many.cost), "of more rows than drafts were measured for"
    fixed = drafts_of(2)
    fixed.head.cache = "cache"
    fixed.add_prompts(prompts)
    fixed.catch_up(live, fits=True)
    fixed.add_cost(1, got(kept=[1]), False)
    assert (fixed.cost, fixed.plain_cost) == (0, 0)


def test_costs_are_shared_by_forwards_and_what_was_accepted_is_told(drafts_of):
    drafts, told = drafts_of(None, DEEP), []
    drafts.cost, drafts.plain_cost = 8.0004, 4.0004
    group_ = RolloutGroup(prompts_of(2)[0], [Completion([1], [0.0], "", "stop", 0, DraftStats(n)) for n in (1, 3, 0)])
    assert drafts.with_costs([group_]) == [group_]
    assert [(c.draft.cost, c.draft.plain_cost) for c in group_.completions] == [(2.0, 1.0), (6.0, 3.0), (0, 0)]
    for alone, costs in ((0, (8.0, 4.0)), (2, (0, 0))):
        completion = group_.completions[alone]
        drafts.with_costs([replace(group_, completions=[completion])])
        assert (completion.draft.cost, completion.draft.plain_cost) == costs
    drafts.controller.observe = lambda *given: told.append(given)
    live = SimpleNamespace(alive=torch.tensor([True, False, True]))
    drafts.observe(live, 2, got(drafted=2, kept=[1, 1, 1], accepted=[2, 1, 1]))
    assert told == [(2, [2, 1])]


@pytest.mark.parametrize(("prompts", "missed"), [([(2, 6), (1, 3)], 3 + 10), ([(1, 3)], 3 + 3), ([], 3)])
def test_what_a_head_has_missed_by_hand(prompts, missed):
    """A row has five unread, of which a round gives two. Of the prompts' tokens two rows need two thirds or all."""
    drafter = object.__new__(Drafter)
    drafter.most_new = 2
    drafter.prefilled = [Prefilled(torch.zeros(n), torch.zeros(n, length), None, None) for n, length in prompts]
    assert drafter.missed(SimpleNamespace(unread=torch.tensor([5, 1]), index=[0, 1])) == missed


def test_what_was_put_together_is_not_of_a_row_that_comes_after_it(policy):
    """A row leaves, what both had unread is put together, then the other one leaves too, and a new one takes its place
    before the next round."""
    decoder = Engine(policy).decoder
    for put_together in (lambda drafter, live: drafter.select(live, live.every), Drafter.read_ahead):
        drafter = Drafter(decoder, FREE, room=30, longest=12, most_new=2)
        drafter._read_tokens = lambda live, *given: None
        drafter.ready = lambda live: SimpleNamespace(advance=lambda kept_R: None)
        width = policy.config.hidden_size

        def started(*index, number=drafter.number) -> Rows:
            many = torch.tensor(index)
            return Rows.start(many, torch.zeros(len(index), 2), torch.full_like(many, 3), number)

        live = started(*range(6))
        for _ in range(2):
            drafter.add_unread(live, torch.full((6, 2), 7), torch.ones(6, 2, width), torch.full((6,), 2))
        live = live.select(torch.tensor([0]))
        put_together(drafter, live)
        assert len(drafter.unread) == 1
        new = started(0, number=drafter.number)
        drafter.add_unread(new, torch.tensor([[8, 9]]), torch.ones(1, 2, width), torch.tensor([1]))
        tokens, _ = drafter.take_unread(new, int(new.unread.max()))
        assert tokens.tolist() == [[8]]


def test_rounds_without_drafts_gain_nothing_and_lose_nothing(policy):
    dear = CostTable(rows=[1, 4], rounds=[[10.0, 30.0], [16.0, 60.0]])
    found = completions(Engine(policy, costs=dear).sample(prompts_of(12, 5), replace(FREE, group_size=2)))
    assert sum(draft.cost for draft in (one.draft for one in found)) == pytest.approx(19 * 16, abs=0.01)
    assert draft_gain(found) == 1
    fixed = completions(Engine(policy).sample(prompts_of(12), replace(FREE, draft_tokens=1)))
    assert draft_gain(fixed) is None


def test_a_head_that_never_drafts_holds_the_prompts_of_live_rows_only(policy):
    dear = CostTable(rows=[1, 4], rounds=[[10.0, 30.0], [16.0, 60.0]])
    engine, prompts = Engine(policy, costs=dear, max_rows=8), prompts_of(*range(1, 31))
    params = replace(PARAMS, draft_tokens=None, group_size=2, max_completion_tokens=12)
    with torch.inference_mode():
        batch = Batch(engine.decoder, prompts, params)
        decoding = Decoding(batch)
        most = 0
        while not decoding.done:
            decoding.decode_round()
            most = max(most, sum(len(part.numbers_P) for part in batch.drafts.head.prefilled))
    assert sum(batch.groups()[-1].completions[0].draft.drafted) == 0
    assert most <= MOST_HELD * 8 // 2
