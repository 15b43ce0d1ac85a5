"""Runs with a cassette: the same bits online, offline and with other workers; faults in the events; MCP servers."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from judges import judge_server, verdict
from mcp_stub import http_server

from grpo.config.run import TrainConfig
from grpo.run.records import read_metrics
from grpo.train import train
from rewards.config.options import ConfigError, load
from rewards.isolation.cassette import FAULTS, put_in
from rewards.protocol import RewardError
from rewards.records import read_rollouts
from rollout.environments.format import Call, Turn, TurnFormat

CASES = Path(__file__).parents[1] / "cases"
COUNTING = '''
import time

class Counting:
    """Answers what never comes again."""

    def reset(self, **columns) -> None:
        pass

    def count(self) -> str:
        """Counts."""
        self.number = time.time_ns() % 97
        return str(self.number)

    def get_reward(self) -> float:
        return getattr(self, "number", 0) / 97
'''
AGENT = """
import sys
import time

from rewards.isolation.cassette import recorded

sys.path.insert(0, {cases!r})
from agents import text

@recorded
def look(word):
    return time.time_ns() % 97

def solve(base_url, api_key, prompt):
    answer = text(base_url, api_key, prompt, max_tokens=4)
    number = look(answer)
    text(base_url, api_key, prompt + answer + str(number), max_tokens=4)
    return number / 97
"""


class Eager(TurnFormat):
    """Whatever a policy that knows nothing writes is a call of a tool; the rest is the plain form."""

    def read(self, token_ids) -> Turn:
        number = sum(token_ids) % 4
        if number == 3:
            return Turn("done")
        calls = {"count": {}, "find": {"word": "ab"[number % 2]}}
        tool = next(name for name in self._parameters if name in calls)
        return Turn("", (Call(tool, calls[tool]),))


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """A policy that knows nothing ends a turn now and then: about one token in fifteen is a stop token."""
    monkeypatch.setattr("rollout.environments.episodes.TurnFormat", Eager)
    monkeypatch.setattr("policies.policy.Policy.stop_token_ids", property(lambda _: [0, *range(7, 250, 15)]))


@pytest.fixture
def config(micro_config, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTING)
    (tmp_path / "agent.py").write_text(AGENT.format(cases=str(CASES)))
    given = {"warm_start.steps": 0, "rollout.max_completion_tokens": 40, "rollout.temperature": 1.3, "steps": 2}

    def made(name, mode="record", **options):
        played = {"cassette.file": tmp_path / "a.jsonl", "cassette.mode": mode}
        return micro_config(tmp_path / name, **given | played | {"reward.on_error": "drop_sample"} | options)

    return made


def judged(url, **options):
    arguments = {"url": url, "model": "m", "rubric": "{prompt} -> {completion}", "backoff_s": 0.0, "retries": 0}
    return [{"function": "judge", "arguments": arguments | options}]


def bits(folder, steps=2):
    weights = sorted((folder / "policy").glob("*.safetensors"))
    return [file.read_bytes() for file in weights], [read_rollouts(folder, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "record"}, "cassette .*: there is no file to play; set file"),
        ({"faults": {"late": 0.1}}, "cassette .*: there is no file to play; set file"),
        ({"file": "a", "faults": {"late": 0.6, "cut": 0.5}}, "together 1 at most"),
        ({"file": "a", "faults": {"lost": 0.5}}, "rate_limited"),
    ],
)
def test_what_plays_nothing_is_refused_by_its_key(options, words):
    with pytest.raises(ConfigError, match=words):
        load(TrainConfig, None, {"output_dir": "runs/x", "cassette": options})


def test_a_cassette_that_is_not_there_is_refused_before_a_policy_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.steps.opening.load_policy", lambda *_: pytest.fail("loaded a policy"))
    with pytest.raises(ValueError, match=r"cassette.file=.*a.jsonl: there is no such file; record it first"):
        train(config("run", "replay", environment=f"{tmp_path}/counting.py:Counting"))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(RewardError, match="it has no answer of environment episode check, after 0 calls: the end"):
        train(config("run", "replay", environment=f"{tmp_path}/counting.py:Counting"))


def test_every_fault_of_a_run_is_in_its_events(config, tmp_path):
    """Of a judge and of tools: function, prompt, sample, its name. The first example, tried before, meets none."""
    faults = dict.fromkeys(FAULTS, 0.12)
    options = {"environment": f"{tmp_path}/counting.py:Counting", "steps": 1, "prompts_per_step": 8}
    with judge_server(lambda asked: verdict(random.random())) as server:
        train(config("run", **options, rewards=judged(server.url), **{"cassette.faults": faults}))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    errors = [event for event in events if event["event"] == "reward_error"]
    named = Counter(
        (event["function"], fault) for event in errors for fault in FAULTS if put_in(fault) in event["message"]
    )
    assert named.total() == len(errors) > 8
    assert {function for function, _ in named} == {"environment", "judge"}
    lines = read_rollouts(tmp_path / "run", 1)
    missing = {
        (function, line["prompt_id"], line["sample"])
        for line in lines
        for function, part in line["parts"].items()
        if part is None
    }
    assert {(event["function"], event["prompt_id"], event["sample_index"]) for event in errors} == missing
    [metrics] = [line for line in read_metrics(tmp_path / "run") if "tools/failures" in line]
    assert metrics["tools/failures"] == sum(line["tools"]["failure"] is not None for line in lines)


@pytest.mark.slow
def test_a_run_repeats_offline_to_the_bit(config, tmp_path):
    options = {"environment": f"{tmp_path}/counting.py:Counting"}
    with judge_server(lambda asked: verdict(random.random())) as server:
        options["rewards"] = judged(server.url)
        train(config("online", **options))
        recorded = (tmp_path / "a.jsonl").read_bytes()
    train(config("offline", "replay", **options))
    train(config("again", "replay", **options, **{"reward.workers": 2, "program_workers": 2}))
    assert bits(tmp_path / "online") == bits(tmp_path / "offline") == bits(tmp_path / "again")
    assert (tmp_path / "a.jsonl").read_bytes() == recorded
    kinds = Counter(json.loads(line)["kind"] for line in recorded.splitlines())
    assert min(kinds["http"], kinds["environment"]) > 16
    with judge_server(lambda asked: verdict(random.random())) as server:
        train(config("other", **options | {"rewards": judged(server.url), "cassette.file": tmp_path / "b.jsonl"}))
    assert bits(tmp_path / "other") != bits(tmp_path / "online")
    faults = {"cassette.faults": dict.fromkeys(FAULTS, 0.05)}
    options["rewards"] = judged(server.url)
    options["cassette.file"] = tmp_path / "b.jsonl"
    with judge_server(lambda asked: verdict(random.random())) as server:
        options["rewards"] = judged(server.url)
        train(config("faulty", **options, **faults))
    train(config("faulty again", "replay", **options, **faults))
    assert bits(tmp_path / "faulty") == bits(tmp_path / "faulty again")


@pytest.mark.slow
def test_two_steps_with_an_mcp_server_repeat_without_it(config, tmp_path):
    """The stub counts the calls of all episodes, in the order of their arrival: without a cassette nothing repeats."""
    pytest.importorskip("mcp", reason="the MCP SDK is not installed: pip install mcp")
    with http_server() as server:
        options = {"environment": f"mcp:{server.url}"}
        train(config("online", **options))
        asked = len(server.asked)
        train(config("there", "replay", **options))
        assert len(server.asked) == asked
    train(config("offline", "replay", **options, program_workers=2))
    assert bits(tmp_path / "online") == bits(tmp_path / "there") == bits(tmp_path / "offline")
    told = [turn["content"] for line in read_rollouts(tmp_path / "online", 1) for turn in line["turns"] or []]
    assert len(set(filter(str.isdigit, told))) > 8


@pytest.mark.slow
def test_a_run_with_an_agent_repeats_offline_to_the_bit(config, tmp_path):
    """One process asks in one order. With several the sampler's floats follow from which requests met in a batch; what
    was sampled and learned does not."""
    options = {"agent": f"{tmp_path}/agent.py:solve", "program_workers": 1, "rollout.draft_tokens": 0}
    with judge_server(lambda asked: verdict(random.random())) as server:
        options["rewards"] = judged(server.url)
        train(config("online", **options))
    train(config("offline", "replay", **options))
    assert bits(tmp_path / "online") == bits(tmp_path / "offline")
    train(config("together", "replay", **options | {"program_workers": 3}))
    (weights, one), (again, three) = bits(tmp_path / "online"), bits(tmp_path / "together")
    assert weights == again
    names = ("token_ids", "turns", "parts", "advantage")
    assert [[[line[name] for name in names] for line in step] for step in one] == [
        [[line[name] for name in names] for line in step] for step in three
    ]
    kinds = Counter(json.loads(line)["kind"] for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert min(kinds["http"], kinds["function"]) > 8


@pytest.mark.long
def test_ray_workers_find_the_cassette(config, tmp_path):
    """In their processes nothing is patched, so that another number of them is compared, and not none."""
    options = {"environment": f"{tmp_path}/counting.py:Counting", "rewards": [], "steps": 1, "rollout.workers": 2}
    train(config("online", **options))
    assert (tmp_path / "a.jsonl").read_text().count('"kind": "environment"') > 16
    train(config("offline", "replay", **options | {"rollout.workers": 1}))
    assert bits(tmp_path / "online", 1) == bits(tmp_path / "offline", 1)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["stdio", "http"])
def test_two_steps_with_a_server_of_the_official_sdk(config, tmp_path, by):
    pytest.importorskip("mcp", reason="the MCP SDK is not installed: pip install mcp")
    from mcp_server import http

    options = {"program_timeout_s": 60, "prompts_per_step": 2, "cassette.file": None, "cassette.mode": "replay"}
    with http() as url:
        server = url if by == "http" else f"{sys.executable} {CASES}/mcp_server.py"
        train(config("run", **options, environment=f"mcp:{server}"))
    for step, metrics in enumerate(read_metrics(tmp_path / "run"), start=1):
        for line in read_rollouts(tmp_path / "run", step):
            told = [turn["content"] for turn in line["turns"] if turn["role"] == "tool"]
            assert all(text.startswith(("a is here: ", "b is here: ")) for text in told)
            assert line["tools"]["failure"] is None
            if by == "stdio":  # a process of its own counts from 1
                assert [text[-1] for text in told] == [str(i + 1) for i in range(len(told))]
        assert metrics["step"] == step
        assert metrics["tools/tokens"] > 0
    assert step == 2
