"""Accuracy is reported only where the reward says right or wrong; otherwise every output shows the mean reward."""

import json
import os
from dataclasses import replace

import pytest
from rich.console import Console

from grpo.cli.commands import eval_report, summary
from grpo.cli.commands.eval import CompletionsFile, evaluate_model
from grpo.cli.commands.export import export
from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.evaluation.evaluate import as_metrics, evaluate, evaluate_ways
from grpo.task.task import Task
from grpo.train import train
from review.readers.run_folder import best_step, check, read_metrics
from rewards import BUILT_IN, Signature, load_reward, per_completion, right_at
from rewards.config.data import SourceOptions
from rewards.config.options import load
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.group_score import GroupScore, RewardFailure
from rewards.verdicts import Verdicts, held_out_metric
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.sampling import SamplingParams

SAMPLING = SamplingParams(group_size=2)
REWARDS = """
from rewards import per_completion, right_at

def letters(completions, **_):
    return [float(sum(c.isalpha() for c in text)) for text in completions]

def exact(completions, **_):
    return [float(text == "#### 42") for text in completions]

def half(completions, **_):
    return [0.5 if text == "half" else float("42" in text) for text in completions]

@right_at(1.0)
@per_completion
def partial(completion, **_):
    return {"#### 42": 1.5, "right": 1.0, "close": 0.9}.get(completion, 0.0)

@right_at(None)
def form(completions, **_):
    return [float("#" in text) for text in completions]

def broken(completions, **_):
    if "fail" in completions:
        raise ValueError("boom")
    return [float("42" in text) for text in completions]
"""


class Answers:
    """Samples these texts for every prompt; greedy decoding gives the last one."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def sample(self, prompts, params, on_finished=None):
        texts = self.texts[: params.group_size] if params.temperature else self.texts[-1:]
        completions = [Completion([1, 0], [-0.5, -0.5], text, "stop", 0) for text in texts]
        return [RolloutGroup(prompt, completions) for prompt in prompts]


def _prompts(count: int = 2) -> list[Prompt]:
    return [Prompt(f"p/{i}", "6 * 7 = ?\n", [5], {"question": "6 * 7 = ?", "answer": "#### 42"}) for i in range(count)]


@pytest.fixture
def task(tmp_path):
    """`task("exact")`: a task with that reward of the file above."""
    opened = []

    def build(name: str, on_error: str = "abort") -> Task:
        (tmp_path / "own.py").write_text(REWARDS)
        reward = RewardOptions(function=f"{tmp_path}/own.py:{name}")
        opened.append(
            Task(SourceOptions(task_options={"levels": [1]}, limit=4), [reward], ScoringOptions(on_error=on_error))
        )
        return opened[-1]

    yield build
    for one in opened:
        one.close()


def _judged(result) -> tuple:
    return result.correct, result.accuracy, result.interval, result.pass_at, result.majority_at


NOT_JUDGED = (None, None, None, {}, {})


@pytest.mark.parametrize(
    ("name", "texts", "on_error", "correct", "mean"),
    [
        ("letters", ("abc", "a"), "abort", None, 2.0),
        ("letters", ("1", ""), "abort", None, 0.0),  # the gold solution gives it away, whose mark is none of these
        ("exact", ("#### 42", "41"), "abort", 2, 0.5),
        ("partial", ("right", "close"), "abort", 2, 0.95),  # it declares from which mark on a completion is right
        ("form", ("# 1", "1"), "abort", None, 0.5),  # it declares that it is no accuracy
        ("broken", ("42", "fail"), "score=-0.5", 2, 0.25),  # what stands in for a failure is no mark of the reward
    ],
)
def test_accuracy_is_that_of_rewards_which_say_right_or_wrong(task, name, texts, on_error, correct, mean):
    result = evaluate(Answers(*texts), task(name, on_error), _prompts(), SAMPLING)
    assert (result.completions, result.without_mark, result.reward_mean) == (4, 0, pytest.approx(mean))
    if correct is None:
        assert _judged(result) == NOT_JUDGED
    else:
        assert (result.correct, result.accuracy, result.pass_at[2].value) == (correct, 0.5, 1.0)
    metrics = as_metrics({"sampled": result, "greedy": replace(result, reward_mean=1.0)})
    assert all(check(name) for name in metrics)
    assert (metrics["eval/reward_mean"], metrics["eval/reward_mean_greedy"]) == (pytest.approx(mean), 1.0)
    judged = [name for name in metrics if "accuracy" in name or "pass_at" in name or "majority" in name]
    assert bool(judged) == (correct is not None)


def test_without_any_mark_there_is_neither_accuracy_nor_mean(task):
    result = evaluate(Answers("fail", "fail"), task("broken", "drop_sample"), _prompts(), SAMPLING)
    assert (result.accuracy, result.reward_mean, result.without_mark) == (None, None, 4)
    metrics = as_metrics({"sampled": result, "greedy": result})
    assert not {"eval/accuracy", "eval/reward_mean"} & metrics.keys()
    assert metrics["eval/prompts"] == 2


def test_one_other_mark_ends_that_for_all_ways_of_sampling_and_for_good(task, tmp_path):
    ways = {"sampled": SAMPLING, "greedy": replace(SAMPLING, temperature=0.0, group_size=1)}
    progress = type("Bar", (), {"add_task": lambda *_, **__: 0, "advance": lambda *_: None})()
    one = task("half")
    before = evaluate(Answers("42", "41"), one, _prompts(), SAMPLING)
    assert before.accuracy == 0.5
    file = CompletionsFile(tmp_path / "out", one)
    results = evaluate_ways(Answers("42", "41", "half"), one, _prompts(), ways, 8, progress, file.write)
    file.close()
    assert [_judged(result) for result in results.values()] == [NOT_JUDGED] * 2
    assert (results["sampled"].reward_mean, results["greedy"].reward_mean) == (0.5, 0.5)
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [(row["correct"], row["reward"]) for row in rows] == [(None, r) for r in (1.0, 0.0, 1.0, 0.0, 0.5, 0.5)]
    assert evaluate(Answers("42", "41"), one, _prompts(), SAMPLING).accuracy is None


def test_what_the_built_in_rewards_declare():
    """`column`, `environment`, `agent`, `judge` and servers hand on what others say, so their marks show it."""
    for name in BUILT_IN:
        judges = (name.startswith("gsm8k") and name != "gsm8k_format") or name in (
            "math_equivalence",
            "reasoning_gym",
            "code",
        )
        handed_on = ("column", "environment", "agent", "remote", "judge", "nemo_gym", "openenv")
        expected = "undeclared" if name in handed_on else 1.0 if judges else None
        assert Signature.of(load_reward(name)).right_at == expected, name
    assert Signature.of(right_at(0.5)(per_completion(lambda completion: 1.0))).right_at == 0.5
    assert Signature.of(per_completion(right_at(0.5)(lambda completion: 1.0))).right_at == 0.5
    with pytest.raises(ValueError, match="right_at\\(inf\\): give the mark from which"):
        right_at(float("inf"))


def test_the_best_step_is_by_mean_reward_once_a_step_has_no_accuracy():
    lines = [
        {"step": 0, "eval/accuracy": 1.0, "eval/reward_mean": 1.0},
        {"step": 1, "eval/accuracy": 0.0, "eval/reward_mean": 0.0},
        {"step": 2, "eval/reward_mean": 0.4},
        {"step": 3, "eval/reward_mean": 0.3},
    ]
    assert best_step(lines, [1, 2, 3]) == 2
    assert best_step(lines[:2], [0, 1]) == 0
    assert held_out_metric([{"loss/total": 1.0}, lines[0]]) == "eval/accuracy"  # a line without an evaluation
    assert best_step([{"step": 1, "eval/reward_mean": -2.0}, {"step": 2, "eval/reward_mean": -1.0}], [1, 2]) == 2


def test_max_score_are_what_the_gold_solution_gets_and_one_other_mark_is_seen_among_many():
    given = (("undeclared", None), ("undeclared", 0.5), ("undeclared", 3.0), (0.5, 3.0), (None, 2.0))
    assert [Verdicts("r", at, gold).max_score for at, gold in given] == [1.0, 1.0, 3.0, 0.5, 2.0]
    assert Verdicts("r", 2.0, 2.0).of(1.0) is False
    verdicts = Verdicts("r", "undeclared", None)
    assert [verdicts.of(mark) for mark in (None, sum([0.1] * 10), 2.0, 0.9)] == [None, True, True, False]
    verdicts.see([1.0, 0.5])
    assert not verdicts.are_given
    verdicts, of_another = Verdicts("r", "undeclared", None), RewardFailure("other", "p", 0, "raised", "boom")
    verdicts.see_scores([GroupScore([0.5], {"r": [0.5]}, [of_another])])
    assert not verdicts.are_given


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdicts") / "run"
    given = {"steps": 2, "sft.steps": 0, "eval.limit": 3, "eval.every": 1, "eval.samples": 2}
    given |= {"checkpoint.keep_best": True}
    return folder, train(micro_config(folder, **given))


def _text(show) -> str:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(console)
    return console.export_text()


def test_a_run_with_another_reward_records_shows_and_keeps_by_the_mean_reward(run, monkeypatch, capsys):
    folder, results = run
    lines = read_metrics(folder)
    assert len(lines) == 3
    for line in lines:
        assert "eval/reward_mean" in line
        assert not [name for name in line if "accuracy" in name or "pass_at" in name or "majority" in name]
    best = max((1, 2), key=lambda step: (lines[step]["eval/reward_mean"], step))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "best"] == [best]

    def shown(console):
        monkeypatch.setattr(summary, "CONSOLE", console)
        summary.evaluations(results.evaluations)

    text = _text(shown)
    assert "reward, mean" in text
    assert f"{results.evaluations['after GRPO, sampled'].reward_mean:.3f}" in text
    assert "correct" not in text
    assert "accuracy" not in text


def test_its_model_card_shows_the_mean_reward(run, tmp_path):
    folder, _ = run
    export(folder, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text().split("## Training")[0]
    first = read_metrics(folder)[0]
    row = f"| before (step 0) | 3 | {first['eval/reward_mean']:.3f} | {first['eval/reward_mean_greedy']:.3f} |"
    assert row in card
    assert "| | problems | mean reward, sampled | mean reward, greedy |" in card
    assert "accuracy" not in card
    assert "correct" not in card


def test_quartet_eval_of_it_has_no_accuracy_in_table_json_and_completions(run, tmp_path):
    folder, _ = run
    given = {"model": str(folder), "threads": 1, "eval.samples": 2, "output": tmp_path / "out"}
    evaluation = evaluate_model(load(EvalConfig, None, defaults_of_run(folder) | given), Console(quiet=True))
    text = _text(lambda console: eval_report.show(evaluation, console))
    table = "".join(line for line in text.splitlines() if line[:1] in "┃│")
    assert "reward, mean" in table
    for word in ("accuracy", "correct", "pass@", "majority"):
        assert word not in table
    assert "no accuracy: the reward letters gives marks other than 0 and 1" in text
    assert "@rewards.right_at" in text
    document = eval_report.as_json(evaluation)
    for row in document["evaluations"].values():
        assert not {"accuracy", "correct", "interval_95", "pass_at", "majority_at"} & row.keys()
        assert "reward_mean" in row
    rows = [json.loads(line) for line in (tmp_path / "out/completions.jsonl").read_text().splitlines()]
    assert {row["correct"] for row in rows} == {None}
