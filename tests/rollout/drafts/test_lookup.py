"""Drafts that are looked up: what is found, by hand; and whatever they are, the tokens stay the trunk's own."""

import doctest
import random
from dataclasses import replace

import pytest
import torch
from engine_cases import PARAMS, PROMPTS, completions, prompts_of, taught, tokens

import rollout.drafts.sources
from rollout import sampling
from rollout.depth import HEAD, CostTable, DepthController, Workload
from rollout.drafts import lookup
from rollout.drafts.lookup import Continuations, Lookup
from rollout.engine import Engine, RolloutError
from rollout.group import Prompt
from rollout.sampling import CountedChoice, Noise, SamplingParams, keyed_uniform, noise_words, row_key
from rollout.shard import Decoding

SOURCES = (("siblings",), ("history",), ("siblings", "history"), ("head", "siblings", "history"))
CHEAP = CostTable(rows=[1], rounds=[[1.0, 1.3, 1.5]], lookups=[[1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.08]])


def test_docstring_examples():
    assert doctest.testmod(lookup).failed == doctest.testmod(sampling).failed == 0


# ---- what is found ----


def test_the_longest_run_is_taken_and_everything_that_followed_it():
    seen = Continuations()
    seen.add([1, 2, 3, 4], start=0, end=4)
    seen.add([9, 2, 3, 5], start=3, end=4)  # of this text only the last token counts
    assert seen.after([2, 3]) == (2, [4, 5])
    assert seen.after([1, 2, 3]) == (3, [4])
    assert seen.after([9, 2, 3]) == (3, [5])
    assert seen.after([8, 8, 2, 3]) == (2, [4, 5])
    assert seen.after([9, 2]) is None
    assert seen.after([3]) is None


def rows_of(sources, history=(), group_size=2, **given) -> Lookup:
    prompt = Prompt("p", "", [1, 2], history=[list(text) for text in history])
    params = SamplingParams(group_size, 0.0, draft_sources=sources, **given)
    rows = Lookup([prompt], params, vocabulary=280)
    rows.begin(0)
    return rows


def test_a_row_drafts_what_its_sibling_wrote_after_the_same_tokens():
    rows = rows_of(("siblings",))
    assert rows.kinds(0) == []
    rows.keep([0, 1], [[5, 6], [5, 9]], [2, 1])
    assert rows.texts == {0: [1, 2, 5, 6], 1: [1, 2, 5]}
    assert rows.kinds(0) == []
    assert rows.kinds(1) == [("siblings", 3)]  # 1, 2, 5 was followed by 6
    assert rows.draft(1, "siblings", 4) == [6]
    rows.keep([0, 1], [[7, 8, 9], [0, 0, 0]], [3, 0])
    assert rows.draft(1, "siblings", 2) == [6, 7]
    assert rows.draft(1, "siblings", 8) == [6, 7, 8, 9]


def test_a_row_drafts_what_itself_and_the_prompt_have():
    rows = Lookup([Prompt("p", "", [3, 4, 5, 6])], SamplingParams(1, 0.0, draft_sources=("siblings",)), 280)
    rows.begin(0)
    rows.keep([0], [[3, 4]], [2])
    assert rows.draft(0, "siblings", 8) == [5, 6, 3, 4, 5, 6, 3, 4]


def test_history_is_a_source_of_its_own():
    rows = rows_of(("siblings", "history"), history=[[5, 7, 7], [5, 8], [5, 8]])
    rows.keep([0, 1], [[5, 6], [5, 0]], [2, 1])
    assert rows.kinds(1) == [("siblings", 3), ("history", 3)]
    assert rows.draft(1, "siblings", 2) == [6]
    assert rows.draft(1, "history", 2) == [8]  # the most frequent, as sampling is greedy
    assert rows.kinds(0) == []
    assert rows_of(("history",), history=[[5, 7]]).kinds(0) == [("history", 2)]  # the prompt itself: a first token


def test_texts_are_counted_when_they_are_first_looked_in():
    """In the order in which they were written, and once."""
    late, early = (rows_of(("siblings", "history"), history=[[5, 7], [5, 8]]) for _ in range(2))
    for new in ([5, 6], [5, 9], [5, 6]):
        for rows in (late, early):
            rows.keep([0, 1], [new, new], [2, 1])
        early.kinds(0)
    assert late.seen == {}
    assert late.kinds(0) == early.kinds(0) == [("siblings", 2)]
    assert {key: vars(seen) for key, seen in late.seen.items()} == {key: vars(seen) for key, seen in early.seen.items()}
    assert late.uncounted == early.uncounted == {}


def test_nothing_is_counted_where_drafts_cannot_pay(policy, monkeypatch):
    params = replace(PARAMS, draft_sources=("siblings", "history"))
    prompts = with_history(policy, params)
    plain = Engine(policy).sample(prompts, replace(params, draft_tokens=0))
    monkeypatch.setattr(Continuations, "add", None)  # calling it would fail
    dear = CostTable(rows=[1], rounds=[[1.0]], lookups=[[1.0, 2.0, 3.0]])
    assert tokens(Engine(policy, costs=dear).sample(prompts, replace(params, draft_tokens=None))) == tokens(plain)


def test_texts_are_counted_once_that_is_worth_it(policy, monkeypatch):
    """Two rows, a prompt of 12 tokens, 1 ms to count each. Of an unknown kind 1.5 tokens are expected in 6 ms, so a
    round without them, of 10 ms, may lose 6: 12 ms after two."""
    looked, kinds = [], Lookup.kinds
    monkeypatch.setattr(Lookup, "kinds", lambda self, row: looked.append(row) or kinds(self, row))
    monkeypatch.setattr(rollout.drafts.sources, "COUNTING", 1.0)
    costs = CostTable(rows=[1], rounds=[[10.0]], lookups=[[10.0, 6.0]])
    params = replace(PARAMS, group_size=2, draft_sources=("siblings",), draft_tokens=None, stop_token_ids=())
    decoding = Decoding(Engine(policy, costs=costs).decoder, prompts_of(12), params)
    rounds = []
    with torch.inference_mode():
        while not decoding.done:
            before = len(looked)
            decoding.forward()
            rounds.append(len(looked) > before)
    assert rounds[:6] == [False] * 2 + [True] * 4


def test_rows_of_one_prompt_share_their_texts_also_where_they_are_prompts_of_their_own():
    """With `rollout.partial` each row goes on as a prompt of its own, with the same id."""
    prompts = [Prompt("p", "", [1, 2, 5, 6, 7], first_sample=0), Prompt("p", "", [1, 2, 5, 9], first_sample=1)]
    rows = Lookup(prompts, SamplingParams(1, 0.0, draft_sources=("siblings",), start=2), 280)
    rows.begin(0)
    rows.begin(1)
    rows.keep([0, 1], [[8, 3], [5, 6]], [2, 2])
    assert rows.draft(1, "siblings", 2) == [7, 8]
    assert Lookup([prompts[0], replace(prompts[1], prompt_id="q")], rows.params, 280).seen == {}


# ---- the noise ----


@pytest.mark.parametrize("length", [2, 8, 12])  # of a prompt: as long as what is looked up, shorter and longer
def test_a_draft_has_the_noise_of_its_place_in_the_completion(length):
    """Of one that had four tokens before its prompt ended, and got three since."""
    params = SamplingParams(1, 1.0, draft_sources=("siblings",), start=4)
    rows, places = Lookup([Prompt("p", "", [5] * length)], params, 280), []
    rows.choose = lambda key, position, counts: places.append(position) or 5
    rows.begin(0)
    rows.keep([0], [[5, 5, 5]], [3])
    assert rows.draft(0, "siblings", 3) == [5, 5, 5]
    assert places == [7, 8, 9]


@pytest.mark.parametrize("vocabulary", [280, 5000])
def test_one_tokens_noise_is_that_of_the_tensor(vocabulary):
    params = SamplingParams(seed=3, step=7)
    for sample, position in ((0, 0), (3, 1), (11, 500)):
        key = row_key(params, "p", sample)
        noise = Noise(torch.tensor([key], dtype=torch.int32), torch.tensor([position]), vocabulary)
        words = noise_words(key, position)
        names = [0, 1, 279, vocabulary - 1, -1, -3]
        assert [keyed_uniform(words, name) for name in names] == noise.uniform(torch.tensor(names))[0].tolist()


@pytest.mark.parametrize("vocabulary", [280, 5000])
def test_a_counted_choice_is_the_trunks_where_the_counts_are_its_distribution(vocabulary):
    """Log-counts as logits and the same noise give the same token, also where a block is drawn first."""
    rng, choose = random.Random(0), CountedChoice(1.0, vocabulary)
    chosen = set()
    for trial in range(200):
        counts = {rng.randrange(vocabulary): rng.randint(1, 9) for _ in range(6)}
        logits = torch.full((1, vocabulary), -torch.inf)
        for token, count in counts.items():
            logits[0, token] = float(torch.tensor(float(count)).log())
        key = row_key(SamplingParams(), "p", trial)
        noise = Noise(torch.tensor([key], dtype=torch.int32), torch.tensor([trial]), vocabulary)
        expected = int(sampling.choose(logits, 1.0, noise)[0])
        assert choose(key, trial, counts) == expected
        chosen.add(list(counts).index(expected))
    assert len(chosen) == 6


# ---- the controller ----


def test_depth_and_source_are_chosen_by_hand():
    """Two rows. The head is believed to be right in 3 of 4 cases, what is looked up in 2 of 4."""
    costs = CostTable(rows=[2], rounds=[[10.0, 14.0, 18.0]], lookups=[[10.0, 10.3, 11.0]])
    long = ("siblings", 4)
    controller = DepthController(costs, 2)
    # Tokens a row: looked up 1 + .5/2 = 1.25 and 1 + .75/2 = 1.375; by the head 1.75 and 2.3125.
    # A millisecond: .1 without; looked up .1214, .1250; with the head .1250 and .1285.
    assert controller.choose(2, 9, {long: 1}, head=True)[:2] == (2, True)
    assert controller.choose(2, 1, {long: 1}, head=False)[:2] == (1, False)
    assert controller.choose(2, 9, {long: 2}, head=True)[:2] == (2, False)  # 1.75 / 11 = .159
    assert controller.choose(2, 9, {}, head=False)[:2] == (0, False)
    controller.observe(96, [0, 0], HEAD)
    assert controller.choose(2, 9, {long: 1}, head=True)[:2] == (2, False)
    controller.observe(96, [0, 0], long)
    assert controller.choose(2, 9, {long: 1}, head=True)[:2] == (0, False)
    controller.observe(1000, [1000, 0], ("history", 2))
    assert controller.choose(2, 9, {("history", 2): 1}, head=True)[:2] == (1, False)


def test_a_fixed_depth_has_no_costs_and_leaves_the_head_out_where_every_row_has_something_better():
    controller, found = DepthController(None, 3), ("siblings", 4)
    assert controller.choose(2, 9, {}, head=False)[:2] == (0, False)
    assert controller.choose(2, 2, {found: 1}, head=False)[:2] == (2, False)
    assert controller.choose(2, 9, {found: 2}, head=True)[:2] == (3, True)  # the head is believed to be better
    controller.observe(96, [96, 96, 96], found)
    assert controller.choose(2, 9, {found: 2}, head=True)[:2] == (3, False)
    assert controller.choose(2, 9, {found: 1}, head=True)[:2] == (3, True)


# ---- the tokens ----


@pytest.fixture(scope="module")
def policy(random_policy):
    return taught(random_policy(11, attention_bias=True), 0.8, steps=10)


def with_history(policy, params: SamplingParams) -> list[Prompt]:
    """What the same prompts got one step before."""
    groups = Engine(policy).sample(PROMPTS, replace(params, draft_tokens=0).at(params.step - 1))
    return [
        replace(prompt, history=[c.token_ids for c in group.completions])
        for prompt, group in zip(PROMPTS, groups, strict=True)
    ]


def totals(groups, source: str, name: str) -> int:
    return sum(sum(c.draft.by_source.get(source, {}).get(name, [])) for c in completions(groups))


@pytest.mark.parametrize("sources", SOURCES, ids="+".join)
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_contracts_3_and_4_no_source_changes_a_token(policy, sources, temperature):
    params = replace(PARAMS, temperature=temperature, draft_sources=sources)
    prompts = with_history(policy, params)
    plain = Engine(policy).sample(prompts, replace(params, draft_tokens=0))
    for k in (1, 3, 8):
        groups = Engine(policy, max_rows=13).sample(prompts, replace(params, draft_tokens=k))
        assert tokens(groups) == tokens(plain)
        for with_drafts, without in zip(completions(groups), completions(plain), strict=True):
            assert with_drafts.logprobs == pytest.approx(without.logprobs, abs=1e-4)
            draft = with_drafts.draft
            # A forward gives what is accepted and a token of the trunk's own, unless a draft is the last token.
            assert draft.target_forwards + sum(draft.accepted) - len(without.token_ids) in (-1, 0)
            assert sum(draft.drafted) == sum(sum(counts["drafted"]) for counts in draft.by_source.values())
            for counts in draft.by_source.values():
                assert all(0 <= a <= d for a, d in zip(counts["accepted"], counts["drafted"], strict=True))
                assert counts["drafted"] == sorted(counts["drafted"], reverse=True)
        for source in sources if temperature or len(sources) == 1 else ():
            assert totals(groups, source, "accepted") > 0  # greedy rows are all alike, and one source serves them all
        assert groups == Engine(policy, max_rows=13).sample(prompts, replace(params, draft_tokens=k))


@pytest.mark.parametrize("sources", SOURCES, ids="+".join)
def test_contract_3_the_controllers_choices_give_the_same_tokens(policy, sources):
    params = replace(PARAMS, temperature=0.3, draft_sources=sources)
    prompts = with_history(policy, params)
    groups = Engine(policy, costs=CHEAP).sample(prompts, replace(params, draft_tokens=None))
    assert tokens(groups) == tokens(Engine(policy).sample(prompts, replace(params, draft_tokens=0)))
    assert groups == Engine(policy, costs=CHEAP).sample(prompts, replace(params, draft_tokens=None))
    assert all(totals(groups, source, "accepted") > 0 for source in set(sources) - {"head"})


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("sources", SOURCES, ids="+".join)
def test_contracts_3_and_4_over_20_000_tokens(policy, sources):
    compared = dict.fromkeys(range(1, 9), 0)
    for step in range(3, 9):
        params = replace(PARAMS, group_size=16, temperature=0.5, step=step, stop_token_ids=(), draft_sources=sources)
        prompts = with_history(policy, params)
        plain = tokens(Engine(policy).sample(prompts, replace(params, draft_tokens=0)))
        for k in compared:
            rows = random.Random(k * step).choice([16, 40, 256])
            assert tokens(Engine(policy, max_rows=rows).sample(prompts, replace(params, draft_tokens=k))) == plain
            compared[k] += sum(map(len, plain))
    assert min(compared.values()) >= 20_000


def test_an_empty_place_is_no_draft_also_where_it_holds_the_right_token(policy, monkeypatch):
    """Places without a draft hold token 0; here the trunk always says 0, and nothing is counted as accepted there."""
    monkeypatch.setattr(Lookup, "draft", lambda self, row, source, depth: [0][: row % 2])
    params = replace(PARAMS, stop_token_ids=(), max_completion_tokens=9, draft_tokens=4, draft_sources=("siblings",))
    monkeypatch.setattr("rollout.shard.choose", lambda logits, *_: (logits[:, 0].long() * 0, logits[:, 0] * 0))
    for row, completion in enumerate(completions(Engine(policy).sample(PROMPTS[:2], params))):
        draft = completion.draft
        assert completion.token_ids == [0] * 9
        assert draft.accepted == [sum(draft.accepted), 0, 0, 0]
        assert draft.drafted[1:] == [0, 0, 0]
        assert draft.target_forwards + sum(draft.accepted) == 8
        assert (sum(draft.accepted) > 0) == bool(row % 2)
        assert draft.empty > 0


def test_what_cannot_be_drafted_is_refused(random_policy):
    engine = Engine(random_policy(1, mtp=False))
    with pytest.raises(
        RolloutError, match=r"draft_tokens=2, but this policy has no MTP head.*draft_sources=\[siblings\]"
    ):
        engine.sample(PROMPTS, replace(PARAMS, draft_tokens=2))
    with pytest.raises(ValueError, match=r"accept=margin with draft_sources=\['siblings'\].*use accept=exact"):
        engine.sample(PROMPTS, replace(PARAMS, draft_tokens=2, accept="margin", draft_sources=("siblings",)))
    groups = engine.sample(PROMPTS, replace(PARAMS, draft_tokens=2, draft_sources=("head", "siblings")))
    assert tokens(groups) == tokens(engine.sample(PROMPTS, PARAMS))


def test_without_a_head_the_verification_alone_is_measured(random_policy):
    engine = Engine(random_policy(1, mtp=False))
    costs = engine.measure_costs(Workload(2, lookups=True), 3)
    assert [len(row) for row in costs.rounds] == [1, 1]
    assert [len(row) for row in costs.lookups] == [4, 4]
    assert costs.max_depth == 3
    assert costs.milliseconds(1, 2) == float("inf") > costs.milliseconds(1, 2, looked_up=True)
