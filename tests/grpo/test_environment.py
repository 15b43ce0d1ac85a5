"""Runs whose completions are episodes: options, training, evaluation, sampling, and what is refused."""

import inspect
import json
from pathlib import Path

import pytest
import zstandard

from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from grpo.learner.learner import Learner
from grpo.run.stop import Stopped
from grpo.task.sampling import environment_of
from grpo.train import train
from review.readers.run_folder import read_metrics
from rewards.commands.options import ReplayConfig
from rewards.commands.replay import replay
from rewards.config.options import load
from rewards.group_score import RewardFailed
from rewards.protocol import RewardError
from rewards.records import read_rollouts
from rollout.environments.format import Call, Turn, TurnFormat

CASES = Path(__file__).parents[1] / "cases"
INCREMENT, SLOW = f"{CASES}/incrementing.py:IncrementEnv", f"{CASES}/guessing.py:Slow"


EPISODES = {"environment": INCREMENT, "rollout.max_completion_tokens": 40, "rollout.temperature": 1.3}
WHOLE = EPISODES | {"eval.limit": 3, "steps": 2, "reward.on_error": "drop_sample", "sft.steps": 1}


class Eager(TurnFormat):
    """Whatever a policy that knows nothing writes is a call of the first tool; the rest is the plain form."""

    def read(self, token_ids) -> Turn:
        number = sum(token_ids) % 4
        if number == 3:
            return Turn("done")
        tool = next(iter(self._parameters))
        field = {"increment": "step", "guess": "number", "calculate": "expression"}[tool]
        return Turn("", (Call(tool, {field: number if field == "step" else str(number)}),))


@pytest.fixture(scope="module", autouse=True)
def _eager():
    """A policy that knows nothing ends a turn now and then: about one token in fifteen is a stop token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout.environments.episodes.TurnFormat", Eager)
        patch.setattr("policies.policy.Policy.stop_token_ids", property(lambda _: [0, *range(7, 250, 15)]))
        yield


@pytest.fixture(scope="module")
def whole(micro_config, tmp_path_factory):
    """A run of two steps, with an SFT stage, an evaluation and drafts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(micro_config(folder, **WHOLE))
    return folder


def test_contract_14_a_class_as_trl_documents_it_trains_unchanged(whole):
    lines = read_rollouts(whole, 1)
    told = [turn for line in lines for turn in line["turns"] if turn["role"] == "tool"]
    assert len(told) > 5
    for line in lines:
        reached = [int(turn["content"]) for turn in line["turns"] if turn["role"] == "tool"]
        target = len(line["messages"][0]["content"].partition(" Reach ")[0]) % 5
        assert line["prompt"].rstrip().endswith(f" Reach {target}.")
        assert line["parts"]["environment"] == float((reached[-1:] or [0])[0] == target)
        assert line["reward"] == pytest.approx(line["parts"]["environment"] + line["parts"]["letters"])
        assert len(line["sampled"]) == len(line["token_ids"]) == len(line["logprobs"])
    metrics = read_metrics(whole)
    assert metrics[1]["reward/part/environment"] >= 0
    assert metrics[1]["tools/turns_mean"] > 1
    assert metrics[1]["tools/tokens"] == sum(not own for line in lines for own in line["sampled"])
    assert metrics[1]["learner/updates"] == 1
    assert "eval/part/environment" in metrics[0]


CHAT = """
def calls(prompts, completions, **_):
    found = []
    for prompt, messages in zip(prompts, completions):
        assert prompt[-1]["role"] == "user" and messages[0]["role"] == "assistant"
        assert " Reach " in prompt[-1]["content"] or len(messages) == 1  # the gold solution, before any episode
        called = [call["function"]["arguments"]["step"] for m in messages for call in m.get("tool_calls", [])]
        told = [m["content"] for m in messages if m["role"] == "tool" and m["name"] == "increment"]
        assert told == [str(sum(called[: i + 1])) for i in range(len(told))]
        found.append(len(told))
    return found

def last(completions, **_):
    return [len(text) for text in completions]
"""


def test_rewards_read_all_messages_with_chat_and_the_last_turn_without(micro_config, tmp_path):
    """As TRL passes them: the policy's messages with their `tool_calls`, and the tools'. A replay scores the same."""
    (tmp_path / "mine.py").write_text(CHAT)
    calls, last = f"{tmp_path}/mine.py:calls", f"{tmp_path}/mine.py:last"
    rewards = [{"function": f"chat:{calls}"}, {"function": last}]
    train(micro_config(tmp_path / "run", rewards=rewards, steps=1, **EPISODES, **{"sft.steps": 0}))
    lines = read_rollouts(tmp_path / "run", 1)
    for line in lines:
        told = [turn["role"] for turn in line["turns"]].count("tool")
        said = [turn["content"] for turn in line["turns"] if turn["role"] == "assistant"]
        assert (line["parts"]["calls"], line["parts"]["last"]) == (told, len(said[-1]))
    assert len({line["parts"]["calls"] for line in lines}) > 1
    assert any(len(line["text"]) > line["parts"]["last"] for line in lines)
    again = [replay(tmp_path / "run", f"chat:{calls}", ReplayConfig()), replay(tmp_path / "run", last, ReplayConfig())]
    again.append(replay(tmp_path / "run", "environment", ReplayConfig()))
    for result in again:
        assert result.changes == result.failures == []
    assert {result.against for result in again} == {"calls", "last", "environment"}


def test_its_tools_are_those_that_trl_finds():
    from incrementing import IncrementEnv

    from rewards.isolation.environments import methods_of

    members = inspect.getmembers(IncrementEnv, predicate=inspect.isfunction)
    of_trl = [n for n, _ in members if n not in ("reset", "get_reward") and not n.startswith("_")]
    assert list(methods_of(IncrementEnv)) == of_trl == ["increment", "read"]


TOOLS = {"calls": 1, "errors": 0, "bad_calls": 0, "reward": 1.0, "failure": None}


def test_a_damaged_record_of_an_episode_is_named(whole, tmp_path):
    [line, *_] = read_rollouts(whole, 1)
    (tmp_path / "rollouts").mkdir()

    def read(damage):
        written = zstandard.compress(json.dumps(line | damage).encode() + b"\n")
        (tmp_path / "rollouts/step_000001.jsonl.zst").write_bytes(written)
        return read_rollouts(tmp_path, 1)

    for damage, words in (
        ({"turns": None}, "its 'turns' is None"),
        ({"turns": [{"role": "assistant"}]}, "its 'turns' is "),
        ({"turns": ["said"]}, "its 'turns' is "),
        ({"tools": 3}, "its 'tools' is 3"),
        ({"tools": {"reward": 1.0}}, "its 'tools' is "),
        ({"tools": TOOLS | {"reward": "1"}}, "its 'tools' is "),
        ({"tools": TOOLS | {"failure": 3}}, "its 'tools' is "),
    ):
        with pytest.raises(ValueError, match=f"line 1 is damaged: {words}"):
            read(damage)
    failed = {"tools": TOOLS | {"reward": None, "failure": {"kind": "died", "message": "m"}}}
    assert read(failed) == [line | failed]


def test_a_run_brings_its_environment_to_eval_and_sample(whole, tmp_path):
    brought = defaults_of_run(whole)
    assert (brought["environment"], brought["max_turns"]) == (INCREMENT, 8)
    config = load(EvalConfig, None, {"model": str(whole)} | brought)
    assert environment_of(config).environments == (("", INCREMENT),)
    assert main(["eval", str(whole), "--eval.limit", "2", "--output", str(tmp_path), "--threads", "1"]) == 0
    written = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {"environment", "letters"} == set(written[0]["parts"])
    sampled = tmp_path / "sampled.json"
    assert main(["sample", str(whole), "--prompt", "3 + 4 = ?", "--json", str(sampled), "--threads", "1"]) == 0
    [group] = json.loads(sampled.read_text())["groups"]
    assert group["prompt"] == "3 + 4 = ?"
    assert group["completions"][0]["turns"][0]["role"] == "assistant"


@pytest.mark.slow
def test_contract_9_a_stopped_run_with_turns_goes_on_to_the_same_bits(micro_config, whole, tmp_path):
    folder = tmp_path / "again"
    with pytest.raises(Stopped):
        train(micro_config(folder, **WHOLE), stop_after=1)
    train(micro_config(folder, **WHOLE), resume="auto")
    for step in (1, 2):
        assert read_rollouts(folder, step) == read_rollouts(whole, step)


@pytest.mark.slow
def test_contract_6_a_failing_environment_is_named_and_never_a_zero(micro_config, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}", "fate": "nan" if i == 3 else ""} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"environment": SLOW, "data.name": str(data), "data.limit": None, "steps": 1, "prompts_per_step": 8}
    given |= {"sft.steps": 0, "rewards": []}
    with pytest.raises(RewardFailed, match=r"reward 'environment' failed on prompt '.*3', sample 0: nan"):
        train(micro_config(tmp_path / "abort", **given))
    train(micro_config(tmp_path / "drop", **given, **{"reward.on_error": "drop_sample"}))
    lines = read_rollouts(tmp_path / "drop", 1)
    assert sum(line["reward"] is None for line in lines) == 4
    assert all(line["parts"].keys() == {"environment"} for line in lines)


def test_what_cannot_begin_is_refused_before_a_policy_is_loaded(micro_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "__init__", lambda *_: pytest.fail("loaded a policy"))
    monkeypatch.setattr("grpo.steps.opening.load_policy", lambda *_: pytest.fail("loaded a policy"))
    for given, words in (
        ({"environment": "nowhere.py:Env"}, "nowhere.py is not an existing Python file"),
        ({"environment": f"{CASES}/incrementing.py:Increment"}, "has no class 'Increment'"),
        ({"environment": {"": INCREMENT}}, "needs a name for each environment"),
        ({"environment": {"a": INCREMENT, "b": SLOW}}, "column 'environment' holds None; the environments are a, b"),
        ({"tools": [f"{CASES}/guessing.py:triple"]}, "'triple' is not there"),
        ({"rewards": []}, r"rewards=\[\] scores nothing"),
        ({"environment": INCREMENT, "max_turns": 0}, "max_turns"),
    ):
        with pytest.raises((ValueError, RewardError), match=words):
            train(micro_config(tmp_path / "run", **given))


@pytest.fixture
def taught(monkeypatch):
    """The rows of the SFT stage, each with the text of what a tool wrote."""
    seen, forward_backward = [], Learner.forward_backward

    def spy(learner, batch, *rest):
        for row in () if batch.from_rollouts else batch.rows:
            [sample] = row.samples
            written = [i for i, own in zip(sample.token_ids, sample.sampled, strict=True) if not own]
            seen.append((sample, learner.policy.tokenizer.decode(written)))
        return forward_backward(learner, batch, *rest)

    monkeypatch.setattr(Learner, "forward_backward", spy)
    return seen


def test_an_sft_stage_learns_calls_and_not_their_results(micro_config, tmp_path, taught):
    """A marked solution is an episode; what the tool wrote is no target."""
    given = {"environment": "word_game", "data.name": "word_game", "rewards": [], "steps": 1, "sft.steps": 1}
    train(micro_config(tmp_path / "run", **given))
    assert taught
    for sample, _ in taught:
        assert 0 < sample.num_sampled < len(sample.token_ids)
        assert sample.sampled[0]


def test_an_sft_stage_shows_what_the_calculator_writes(micro_config, tmp_path, taught):
    """The solutions say 3.00 and 7, as GSM8K's may; the episode says what the policy will read."""
    solution = "He pays <<2*1.50=3.00>>3.00 and <<3+3=7>>7.\n#### 3"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}?", "answer": solution}) + "\n" for i in range(8)))
    given = {"environment": "calculator", "data.name": str(data), "data.limit": None, "sft.steps": 1, "steps": 1}
    train(micro_config(tmp_path / "run", **given))
    assert taught
    assert {written for _, written in taught} == {"3>>6>>"}


def test_without_tools_nothing_changes():
    config = load(TrainConfig, None, {"output_dir": "runs/x"})
    assert environment_of(config) is None
    assert not config.has_tools
