"""Episodes in the engine: several turns change nothing of what one turn promises."""

import os
import signal
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from copies import OF_REWARDS
from engine_cases import PARAMS, assert_lossless, completions, drafts_in_training, prompts_of, spied_drafts, tokens
from talking import Talking

from grpo.learner.batch import collate
from grpo.learner.row import PackedRow, Sample
from policies.logprobs import token_logprobs
from policies.paths import Paths
from rewards.episode import ToolStats
from rollout.decoding.engine import Engine
from rollout.environments.episodes import Arena, Episode, Episodes, first_messages
from rollout.environments.format import Call, Turn
from rollout.environments.protocol import chosen, columns_of, seeds
from rollout.faults import RolloutError
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.sampling import EnvironmentSpec

GUESSING = Path(__file__).parents[2] / "cases" / "guessing.py"
TEXT = "3 + 4 = 7, how many apples are left? "
PROMPTS = [replace(prompt, text=TEXT[: 4 + 4 * i]) for i, prompt in enumerate(prompts_of(*[1] * 8))]
SPEC = EnvironmentSpec(environments=(("", f"{GUESSING}:Guess"),), max_turns=5)
EPISODES = replace(PARAMS, max_completion_tokens=90, environment=SPEC)
OTHER_WAYS = (("joined", "alone"), ("apart",), ("whole",))
LINEAR = {"num_hidden_layers": 4, "initializer_range": 0.1, "head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SLOW = replace(SPEC, environments=(("", f"{GUESSING}:Slow"),), timeout_s=0.5)


@pytest.fixture(scope="module", autouse=True)
def _talking():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout.environments.episodes.TurnFormat", Talking)
        patch.setattr("rewards.isolation.pool.subprocess", OF_REWARDS)
        yield


@pytest.fixture(scope="module")
def engine(taught_policy):
    engine = Engine(taught_policy())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def sampled(engine):
    return engine.sample(PROMPTS, EPISODES)


def test_contract_3_speculation_is_lossless_over_turns(engine, sampled):
    compared = assert_lossless(engine, PROMPTS, EPISODES, depths=(1, 3))
    assert compared > 1500
    ended = Counter(c.finish_reason for c in completions(sampled))
    assert min(ended["stop"], ended["length"], ended["max_turns"]) >= 3, ended
    assert max(c.num_turns for c in completions(sampled)) == 5
    assert sum(len(c.token_ids) - c.num_sampled for c in completions(sampled)) > 200


@pytest.mark.slow
def test_drafts_of_every_turn_are_what_the_trained_head_says(engine, monkeypatch):
    """After what tools wrote, too: the head has read it. Anything wrong would cost acceptance and no token."""
    asked = spied_drafts(monkeypatch)
    groups = engine.sample(PROMPTS[2:5], replace(EPISODES, draft_tokens=2, group_size=2))
    rows, later = completions(groups), 0
    for row, count, drafts in asked:
        verified, prompt = rows[row].token_ids[:count], groups[row // 2].prompt
        assert drafts == drafts_in_training(engine.policy, prompt, verified, drafts, EPISODES, row % 2)
        later += not all(rows[row].sampled[:count])
    assert later > 30


@pytest.mark.long
def test_contract_3_speculation_is_lossless_over_20_000_multi_turn_tokens(engine):
    params = replace(EPISODES, group_size=8)
    assert sum(assert_lossless(engine, PROMPTS, params.at(step), depths=(1, 2, 3, 4)) for step in range(6)) > 20_000


@pytest.mark.slow
def test_contract_4_batches_refills_and_other_prompts_change_no_token(engine, sampled):
    """Alone, in another order, and in a batch so small that rows are refilled while others wait for their tools."""
    small = Engine(engine.policy, max_rows=6)
    try:
        assert tokens(small.sample(PROMPTS, EPISODES)) == tokens(sampled)
        backwards = small.sample(PROMPTS[::-1], replace(EPISODES, draft_tokens=2))
        assert tokens(backwards[::-1]) == tokens(sampled)
    finally:
        small.close()
    one = replace(EPISODES, environment=replace(SPEC, workers=2))
    assert tokens(engine.sample(PROMPTS[2:3], one)) == tokens(sampled[2:3])


def test_contract_4_a_killed_tool_process_changes_no_token(engine, sampled, monkeypatch):
    """Its episodes are made anew with the same calls."""
    ask, killed = Arena.ask, []

    def kill(arena, requests):
        answer = ask(arena, requests)
        answer.result()
        if len(killed) < 3 and any(request["history"] for request in requests):
            process = arena.pool._workers[0]._process
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed.append(process.pid)
        return answer

    monkeypatch.setattr(Arena, "ask", kill)
    again = engine.sample(PROMPTS, EPISODES)
    assert len(killed) == 3
    assert tokens(again) == tokens(sampled)
    assert [c.tools for c in completions(again)] == [c.tools for c in completions(sampled)]


def _assert_learner_agrees(policy, groups, temperature: float) -> int:
    """Log-probabilities of the sampled tokens by the learner's packed forward; what tools wrote has none."""
    rows = [
        PackedRow(g.prompt.token_ids, [Sample(i, c.token_ids, sampled=c.sampled) for i, c in enumerate(g.completions)])
        for g in groups
    ]
    mini = collate(rows, policy.device)
    with torch.no_grad():
        hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
        before = hidden.gather(1, mini.before[..., None].expand_as(hidden))[mini.scored]
        logits = before @ policy.lm_head.T / temperature
        learner = mini.by_completion(token_logprobs(logits, mini.token_ids[mini.scored]))
    engine = mini.padded([c.logprobs for c in completions(groups)])
    assert (learner - engine).abs().max() < 1e-4
    assert not engine[~mini.mask].any()
    return int(mini.mask.sum())


@pytest.mark.parametrize("draft_tokens", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_contract_2_the_sampler_scores_as_the_learner_does(engine, draft_tokens):
    groups = engine.sample(PROMPTS, replace(EPISODES, draft_tokens=draft_tokens))
    assert _assert_learner_agrees(engine.policy, groups, EPISODES.temperature) > 800


@pytest.mark.parametrize(
    ("kind", "config", "paths"),
    [
        ("qwen3", {}, Paths()),
        *(pytest.param("qwen3", {}, Paths(*ways), marks=pytest.mark.slow) for ways in OTHER_WAYS),
        pytest.param("qwen3_5_text", LINEAR, Paths(), marks=pytest.mark.slow),
        pytest.param("mamba", {"state_size": 8}, Paths("own", "alone"), marks=pytest.mark.slow),
    ],
)
def test_models_of_transformers_have_episodes_too(hf_policy, kind, config, paths):
    policy = hf_policy(kind, 3, **config)
    policy.paths = paths
    engine = Engine(policy)
    try:
        groups = engine.sample(PROMPTS, replace(EPISODES, temperature=1.0))
        assert _assert_learner_agrees(engine.policy, groups, 1.0) > 200
        assert sum(c.num_turns for c in completions(groups)) > 40
    finally:
        engine.close()


def test_tools_that_write_nothing_are_read_as_tokens(hf_policy, monkeypatch):
    """Of all rows that go on together, none has a new token but the one that it sampled."""
    monkeypatch.setattr(Talking, "reply", lambda self, results: [])
    engine = Engine(hf_policy("llama", 3))
    try:
        groups = engine.sample(PROMPTS[:2], replace(EPISODES, max_completion_tokens=60))
        assert all(completion.sampled == [True] * len(completion.token_ids) for completion in completions(groups))
        assert sum(completion.num_turns > 1 for completion in completions(groups)) > 2
    finally:
        engine.close()


def test_the_experts_of_every_token_are_recorded(random_policy):
    """Routing of turns and of what tools wrote, against one forward over the whole episode."""
    policy = random_policy(12)
    engine = Engine(policy)
    try:
        groups = engine.sample(PROMPTS[:3], replace(EPISODES, record_routing=True))
        for completion in completions(groups):
            assert (completion.routing[:-1] >= 0).all()
            assert (completion.routing[-1] == -1).all()
        whole = [replace(g.prompt, token_ids=g.prompt.token_ids + c.token_ids) for g in groups for c in g.completions]
        once = replace(PARAMS, group_size=1, max_completion_tokens=1, record_routing=True)
        read = engine.sample(whole, once)
        for group, completion in zip(read, completions(groups), strict=True):
            length = len(completion.token_ids)
            assert torch.equal(group.prompt_routing[-length:-1], completion.routing[:-1])
    finally:
        engine.close()


def test_a_group_begins_alike_and_then_each_rollout_has_its_own_randomness(engine):
    engine.sample(PROMPTS[:1], EPISODES)
    own = [seeds(EPISODES, "p/0", sample) for sample in range(4)]
    assert len({group for group, _ in own}) == 1
    assert len({rollout for _, rollout in own}) == 4
    assert seeds(EPISODES.at(7), "p/0", 0)[0] != own[0][0]
    arena = engine.stage.arena
    assert arena.thread._max_workers == 1  # the processes of the tools are asked by one thread

    def said(sample: int) -> tuple[str, str]:
        request = {"episode": "e", "environment": "", "columns": {}, "seeds": list(own[sample]), "history": []}
        [reply] = arena.ask([request | {"calls": [["guess", {"number": "1234"}]], "ends": True}]).result()
        digits, _, secret = reply["results"][0][0].split()
        return digits, secret

    assert len({said(sample)[1] for sample in range(4)}) == 1
    assert len({said(sample)[0] for sample in range(4)}) > 2
    assert said(0) == said(0)


def test_contract_4_the_last_samples_of_a_group_are_the_same_without_the_first(engine, sampled):
    """Their environments are seeded by the place in the group, as their noise is."""
    last = [replace(prompt, first_sample=2) for prompt in PROMPTS]
    alone = engine.sample(last, replace(EPISODES, group_size=EPISODES.group_size - 2))
    expected = [replace(group, completions=group.completions[2:]) for group in sampled]
    assert [each.token_ids for each in completions(alone)] == [each.token_ids for each in completions(expected)]


def test_what_happened_is_recorded(sampled):
    for completion in completions(sampled):
        stats, calls = completion.tools, [m for m in completion.turns if m.get("tool_calls")]
        assert stats.calls == len(calls) == stats.reward
        told = [m["content"] for m in completion.turns if m["role"] == "tool"]
        assert stats.errors == told.count("{'error': 'no sevens'}")
        assert stats.bad_calls == told.count("no such tool")
        assert completion.answer == [m["content"] for m in completion.turns if m["role"] == "assistant"][-1]
        assert completion.num_turns <= 5
    assert sum(c.tools.bad_calls for c in completions(sampled)) > 0


@pytest.mark.parametrize(
    ("fate", "kind", "words", "limits"),
    [
        pytest.param("hangs", "timeout", "no result after 0.5 s, stuck at guessing.py", {}, marks=pytest.mark.slow),
        ("dies", "died", "exit code 3", {}),
        ("hungry", "memory", "it needs more memory than its process may have", {"memory_mb": 300, "timeout_s": 10.0}),
    ],
)
def test_contract_6_a_tool_that_cannot_go_on_is_a_failure_of_its_rollout_alone(engine, fate, kind, words, limits):
    params = replace(EPISODES, environment=replace(SLOW, **limits), group_size=2)
    prompts = [replace(PROMPTS[2], text="a", columns={"fate": fate}), replace(PROMPTS[6], text="b", columns={})]
    failed, well = engine.sample(prompts, params)
    found = [c.tools.failure for c in failed.completions if c.tools.failure]
    assert found
    for failure in found:
        assert failure["kind"] == kind
        assert words in failure["message"]
    assert all(c.tools.failure is None and c.tools.reward is not None for c in well.completions)
    unlimited = replace(params, environment=replace(params.environment, memory_mb=None))
    assert tokens([well]) == tokens(engine.sample(prompts[1:], unlimited))


@pytest.mark.slow
def test_what_other_episodes_hold_is_no_failure_of_this_one(engine):
    """Eight episodes of 60 MiB in a process of 300: objects are dropped, and their episodes repeated."""
    params = replace(EPISODES, environment=replace(SLOW, memory_mb=300, timeout_s=10.0), group_size=8)
    prompts = [replace(PROMPTS[6], text="b", columns={"fate": "large"})]
    groups = engine.sample(prompts, params)
    assert sum(c.tools.reward >= 2 for c in completions(groups)) > 5
    assert all(c.tools.failure is None for c in completions(groups))
    unlimited = replace(params, environment=replace(params.environment, memory_mb=None))
    assert groups == engine.sample(prompts, unlimited)


def test_too_little_memory_to_begin_names_the_option(engine):
    little = replace(EPISODES, environment=replace(SLOW, memory_mb=3))
    with pytest.raises(RuntimeError, match="it may need more memory than program_memory_mb=3"):
        engine.sample(PROMPTS[:1], little)


@pytest.mark.parametrize("fate", ["writes", "floods"])
def test_what_a_tool_writes_is_measured_before_it_is_tokenised(engine, monkeypatch, fate):
    reply, most = Talking.reply, 64 * EPISODES.max_completion_tokens

    def measured(self, results):
        assert sum(len(text) for _, text in results) < most
        return reply(self, results)

    monkeypatch.setattr(Talking, "reply", measured)
    params = replace(EPISODES, environment=replace(SLOW, timeout_s=10.0))
    [group] = engine.sample([replace(PROMPTS[6], text="how many apples", columns={"fate": fate})], params)
    written = [c for c in group.completions if c.tools.calls > 1]
    assert written
    for completion in written:
        assert completion.tools.failure is None
        told = [message["content"] for message in completion.turns if message["role"] == "tool"]
        if fate == "writes":
            assert (completion.finish_reason, len(told[-1])) == ("length", 100_000)
        else:
            assert any("guess wrote 1,000,001 characters; it may write 1,000,000" in text for text in told)
            assert completion.tools.errors == 1


def test_an_environment_ends_its_episode_and_adds_to_the_prompt(engine):
    params = replace(EPISODES, environment=SLOW)
    [group] = engine.sample([replace(PROMPTS[6], text="how many apples", columns={"fate": "ends"})], params)
    assert group.prompt.messages[0]["content"].startswith("how many apples ")
    assert engine.policy.tokenizer.decode(group.prompt.token_ids).startswith("how many apples ")
    ended = [c for c in group.completions if c.finish_reason == "environment"]
    assert ended
    for completion in ended:
        assert completion.tools.calls == 2
        assert completion.sampled[-1]
        assert completion.turns[-1]["role"] == "tool"


@pytest.mark.parametrize(
    ("limit", "characters", "reason"),
    [(10, 1, "length"), (11, 1, None), (8, 128, "length"), (11, 319, None), (11, 320, "length")],
)
def test_an_episode_ends_where_what_a_tool_wrote_leaves_no_token_for_another_turn(limit, characters, reason):
    """Six tokens of a turn, and four that the tool writes. 64 characters a token are more than any text has: longer
    ones are not tokenised."""
    asked = []
    arena = SimpleNamespace(formats={"": SimpleNamespace(reply=lambda results: asked.append(1) or [1, 2, 3, 4])})
    episodes = Episodes(arena, replace(EPISODES, max_completion_tokens=limit))
    episode = Episode(0, PROMPTS[0], "", {}, length=6)
    reply = {"results": [("7" * characters, False)], "done": False}
    written = episodes._written(episode, Turn("", (Call("guess", {"number": "7"}),)), reply)
    assert (written, episode.reason) == (None if reason else [1, 2, 3, 4], reason)
    assert episode.written == ([] if reason else [(6, 10)])
    assert bool(asked) == (characters < 64 * (limit - 6))


def test_the_beginning_and_the_turns_of_episodes_by_hand():
    """Of five prompts two begin. Of their four rollouts the first calls two tools in each of its turns, the second
    answers, the tool of the third fails, and the last calls none that is there until it has had two turns."""
    told, answers = [], []

    def ask(requests):
        told.append([(request["episode"], request["history"], request["calls"]) for request in requests])
        assert not any(request["ends"] or "turns" in request for request in requests)
        answer = Future()
        answer.set_result(answers.pop(0))
        return answer

    calls = (Call("f", {"n": 1}), Call("g", {}))
    turns = {(1, 2): Turn("x", calls), (3,): Turn("y"), (4, 4): Turn("", error="no such tool")}
    form = SimpleNamespace(
        tools_prompt=lambda messages: [len(messages[0]["content"])],
        read=lambda ids: turns[tuple(ids)],
        reply=lambda results: [50 + len(results)],
    )
    arena = SimpleNamespace(ask=ask, formats={"": form}, tokenizer=SimpleNamespace(decode=str))
    spec = replace(SPEC, max_turns=2)
    episodes = Episodes(arena, replace(EPISODES, group_size=2, max_completion_tokens=20, environment=spec))
    answers.append([{"observation": said} for said in ("!", "!", "one", "other", None, None, None, None)])
    answers[0][5] = {"kind": "died", "message": "m"}
    sent = {"a": {"x": 1}, "b": {"x": object()}}
    begun = episodes.begin_episodes([Prompt(name, name, [7], sent.get(name, {})) for name in "abcde"])
    assert (begun[0].text, begun[0].token_ids, begun[0].messages) == ("[2]", [2], [{"role": "user", "content": "a!"}])
    assert "prompt 'b': column 'x' cannot be sent" in begun[1]
    assert "prompt 'c': reset gave the rollouts of one group different texts" in begun[2]
    assert begun[3:] == ["prompt 'd': its environment cannot begin: died: m", replace(begun[4], token_ids=[1])]
    assert told == [[(f"2/0/{name}/{sample}", [], []) for name in "acde" for sample in (0, 1)]]
    assert episodes.episodes[1].request["columns"] == {"x": 1}
    assert episodes.episodes[1].request["seeds"] == list(seeds(episodes.params, "a", 1))
    episodes.keep_prompts([True, False, False, False, True])
    one, two, three, four = episodes.episodes
    assert (one.begins, one.length) == (0, 0)

    both = [["f", {"n": 1}], ["g", {}]]
    results = {"results": [("7", False), ("no", True)], "done": False}
    answers.append([results, {"kind": "died", "message": "m"}, {"results": [], "done": False}])
    assert episodes.ask({0: [1, 2], 1: [3], 2: [1, 2], 3: [4, 4]}) == [True, False, True, True]
    assert told[1] == [("2/0/a/0", [], both), ("2/0/e/0", [], both), ("2/0/e/1", [], [])]
    assert episodes.written() == {0: [52], 2: None, 3: [51]}
    functions = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    said = [{"role": "tool", "name": name, "content": text} for name, text in (("f", "7"), ("g", "no"))]
    assert one.turns == [{"role": "assistant", "content": "x", "tool_calls": functions}, *said]
    assert two.turns == [{"role": "assistant", "content": "y"}]
    assert four.turns[1:] == [{"role": "tool", "name": "error", "content": "no such tool"}]
    assert (one.length, one.begins, one.written) == (2, 3, [(2, 3)])

    answers.append([results | {"done": True}, {"results": [], "done": False}])
    assert episodes.ask({0: [1, 2, 52, 1, 2], 3: [4, 4, 51, 4, 4]}) == [True, True]
    assert told[2] == [("2/0/a/0", both, both), ("2/0/e/1", [], [])]
    assert episodes.written() == {0: None, 3: None}
    assert [episode.reason for episode in episodes.episodes] == ["environment", None, "environment", "max_turns"]
    assert [one.stats, two.stats, four.stats] == [ToolStats(4, 2, 0), ToolStats(), ToolStats(0, 0, 2)]
    assert three.stats.failure == {"kind": "died", "message": "m"}
    assert episodes.ask({1: [3]}) == [False]
    assert len(told) == 3


def test_the_end_of_episodes_by_hand():
    """One has ended with its turn, one in the middle of its second, one after its tool, and the tool of one failed."""
    told = []

    def ask(requests):
        told.extend(requests)
        answer = Future()
        answer.set_result([{"reward": 0.5}, {"kind": "died", "message": "m"}, {}])
        return answer

    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"{ids} {skip_special_tokens}")
    episodes = Episodes(SimpleNamespace(ask=ask, tokenizer=tokenizer), EPISODES)
    given = {"begins": 4, "length": 2, "written": [(2, 4)]}
    episodes.episodes = [Episode(0, PROMPTS[0], "", {"episode": i}, **given) for i in range(4)]
    ended, *_, failed = episodes.episodes
    ended.begins, ended.length, ended.written, ended.reason = 0, 3, [], "max_turns"
    failed.stats.failure = {"kind": "timeout", "message": "t"}
    all_ = [Completion(list(range(n)), [0.0] * n, "", "length", 0) for n in (3, 6, 4, 4)]
    episodes.finish([RolloutGroup(PROMPTS[0], all_)])
    asked = [(request["episode"], request["ends"], request["calls"], request["turns"]) for request in told]
    assert asked == [(i, True, [], episodes.episodes[i].turns) for i in range(3)]
    assert [c.turns for c in all_] == [[], [{"role": "assistant", "content": "[4, 5] True"}], [], []]
    assert [c.finish_reason for c in all_] == ["max_turns", "length", "length", "length"]
    assert [sum(c.sampled) for c in all_] == [3, 4, 2, 2]
    assert all_[1].sampled == [True, True, False, False, True, True]
    assert [c.tools.reward for c in all_] == [0.5, None, None, None]
    failures = [c.tools.failure for c in all_]
    assert failures == [None, {"kind": "died", "message": "m"}, None, {"kind": "timeout", "message": "t"}]


def test_bad_environments_are_refused_by_name(engine, tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text("class Bare:\n    def act(self): ...\n\n\nclass Idle:\n    def reset(self): ...\n")
    for path, error, words in (
        (f"{GUESSING}:Different", RolloutError, "prompt 'p/0': reset gave the rollouts of one group different texts"),
        (f"{GUESSING}:Gues", RuntimeError, r"has no class 'Gues' \(did you mean 'Guess'\?\)"),
        (f"{bare}:Bare", ValueError, "has no method `reset`"),
        (f"{bare}:Idle", ValueError, "has no tools"),
    ):
        with pytest.raises(error, match=words):
            engine.sample(PROMPTS[:1], replace(EPISODES, environment=replace(SPEC, environments=(("", path),))))
    several = replace(SPEC, environments=(("a", "x.py:A"), ("b", "x.py:B")))
    with pytest.raises(ValueError, match="column 'environment' holds None; the environments are a, b"):
        chosen(several, {})
    assert chosen(several, {"environment": "b"}) == "b"
    assert columns_of(several, {"environment": "b", "x": 1}) == {"x": 1}
    with pytest.raises(ValueError, match="column 'x' cannot be sent to an environment"):
        columns_of(SPEC, {"x": object()})


def test_tools_need_no_environment(engine):
    params = replace(EPISODES, environment=EnvironmentSpec(tools=(f"{GUESSING}:double",), max_turns=3))
    groups = engine.sample(PROMPTS[:3], params)
    told = [m for c in completions(groups) for m in c.turns if m["role"] == "tool" and m["name"] == "double"]
    assert told
    assert all(c.tools.reward is None and c.tools.failure is None for c in completions(groups))


def test_a_prompt_that_an_environment_makes_too_long_is_named(engine):
    long = replace(PROMPTS[6], text="a", columns={"long": 400})
    with pytest.raises(RolloutError, match=r"prompt 'p/6' has \d+ tokens") as caught:
        engine.sample([PROMPTS[0], long], replace(EPISODES, environment=SLOW))
    assert [group.prompt.prompt_id for group in caught.value.groups] == ["p/0"]
    assert isinstance(caught.value.groups[0].prompt, Prompt)


def test_the_wait_for_tools_calls_back_and_an_arena_closes_what_it_opened():
    answer, arena = Future(), SimpleNamespace(pool=Mock(), thread=Mock())
    episodes = Episodes(arena, EPISODES)
    episodes._asked = [([], answer)]
    assert episodes.written(lambda: answer.set_result([])) == {}
    assert episodes._asked == []
    Arena.close(arena)
    arena.pool.close.assert_called_once()
    arena.thread.shutdown.assert_called_once()


def test_first_messages_end_with_what_reset_said():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "2 + 3?"}]
    found = first_messages(Prompt("a", "", [5], messages=messages), " Use it.")
    assert [message["content"] for message in found] == ["s", "2 + 3? Use it."]
    assert messages[1]["content"] == "2 + 3?"
    assert first_messages(Prompt("a", "2?\n", [5]), None) == [{"role": "user", "content": "2?"}]
