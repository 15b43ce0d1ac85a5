"""`quartet control`: what it trains, on which problems, and what it writes and refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from grpo.cli.commands import control as module
from grpo.cli.commands.control import control, curve, show
from grpo.cli.parse import main
from grpo.task.task import Task
from grpo.train import train
from review.readers.run_folder import CONTROL, read_metrics
from rewards.config.names import recorded_options
from rewards.group_score import GroupScore
from rewards.records import read_rollouts, recorded_steps

CASES = Path(__file__).parents[3] / "cases"
QUIET = Console(quiet=True)
SIZES = {
    "data.task_options.levels": [1],
    "data.limit": 60,
    "data.solutions": 30,
    "data.validation": 4,
    "sft.steps": 2,
    "sft.batch_size": 4,
    "sft.learning_rate": 1e-3,
    "steps": 2,
    "eval.limit": 4,
    "learner.schedule": "linear",
}


@pytest.fixture(scope="module")
def finished(micro_config, tmp_path_factory):
    """A run with its controls, and what `control` has returned."""
    folder = tmp_path_factory.mktemp("control") / "run"
    train(micro_config(folder, **SIZES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_seconds", lambda folder: 0.05)
        for name in ("TIMED", "UNTIMED", "POINTS"):
            patch.setattr(module, name, 1)
        return folder, control(folder, QUIET)


def candidates(folder):
    return sorted(path.parent.name for path in folder.glob("control/*/candidate.json"))


def test_controls_begin_where_grpo_began_and_one_at_the_very_beginning(finished):
    folder, result = finished
    assert candidates(folder) == ["rejection", "supervised_0.0003", "supervised_0.001", "supervised_whole"]
    for name in candidates(folder):
        command, options = recorded_options(folder / "control" / name / "config.yaml")
        assert command == ("train" if name == "rejection" else "sft")
        start = "micro" if name == "supervised_whole" else str(folder / "warm_start")
        assert options["model"] == start
        assert options["learner"]["schedule"] == "linear"
        assert options["data"]["solutions"] == 30
    assert set(result["chosen"]) == {"supervised", "rejection"}

    supervised = [each for each in result["candidates"] if each["kind"] == "supervised"]
    assert len(supervised) == 3
    assert result["chosen"]["supervised"]["validation"] == max(each["validation"] for each in supervised)
    best = folder / "control" / result["chosen"]["supervised"]["name"] / "best_policy"
    assert (best / "config.json").is_file()
    assert json.loads((folder / CONTROL).read_text())["results"] == json.loads(json.dumps(result["results"]))


def test_controls_learn_from_what_the_run_had(finished, micro_config):
    """Rejection sampling has prompts of the unsolved problems, as GRPO has; supervised steps sample none."""
    folder, _ = finished
    with Task.of(micro_config(folder, **SIZES)) as task:
        unsolved = {example.example_id for example in task.unsolved}
    for run in (folder, folder / "control" / "rejection"):
        prompts = {line["prompt_id"] for line in rollouts(run)}
        assert prompts
        assert prompts <= unsolved
    assert not list((folder / "control" / "supervised_whole").glob("rollouts/*"))
    lines = rollouts(folder / "control" / "rejection")
    assert any(line["advantage"] for line in lines)
    for line in lines:
        assert line["advantage"] in (0.0, 1.0)


def rollouts(folder):
    return [line for step in recorded_steps(folder) for line in read_rollouts(folder, step)]


def test_all_policies_answer_the_same_problems_and_are_in_the_table(finished, capsys):
    _, result = finished
    assert set(result["results"]) == {"start", "grpo", "supervised", "rejection"}
    assert set(result["grpo_minus"]) == {"start", "supervised", "rejection"}
    for pair in result["grpo_minus"].values():
        assert pair["sampled"]["problems"] == result["problems"] == 4
        assert pair["sampled"]["low"] is pair["sampled"]["high"] is None  # a reward without verdicts
    show(result, Console(width=80))
    shown = capsys.readouterr().out
    for words in (
        "mean reward on 4 held-out",
        "no interval: rewards have no limits",
        "start",
        "GRPO",
        "supervised steps",
        "rejection sampling",
    ):
        assert words in shown


def test_controls_that_are_there_are_not_trained_again(finished, monkeypatch):
    folder, result = finished

    def trained(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "_supervise", trained)
    monkeypatch.setattr(module, "_reject", trained)
    assert control(folder, QUIET)["results"] == result["results"]


def test_the_curve_counts_seconds_of_training_only(finished):
    folder, _ = finished
    own = folder / "control" / "supervised_0.001"
    points = curve(own)
    assert (points[0]["step"], points[0]["seconds"], points[0]["problems"]) == (0, 0.0, 4)
    assert all(0 <= point[way] <= 1 for point in points for way in ("sampled", "greedy"))
    assert points[-1]["seconds"] == pytest.approx(sum(row.get("time/step", 0) for row in read_metrics(own)), abs=0.06)


@pytest.mark.parametrize(
    ("marks", "verdicts", "expected"),
    [
        ([1.0, 0.5, 0.0, None], [True, False, False, None], [1.0, 0.0, 0.0, 0.0]),
        ([0.2, 0.7, 0.7, None], [None] * 4, [0.0, 1.0, 1.0, 0.0]),  # no verdicts: the best of the group
        ([None, None], [None, None], [0.0, 0.0]),
    ],
)
def test_which_completions_are_kept(marks, verdicts, expected):
    of = dict(zip(marks, verdicts, strict=True)).get
    task = SimpleNamespace(first_reward="mine", verdicts=SimpleNamespace(of=of))
    assert module._correct(task, GroupScore(marks, {"mine": marks})) == expected


@pytest.mark.parametrize(
    ("column", "kinds"), [("answer", {"supervised", "rejection"}), (None, {"rejection"})], ids=["solutions", "none"]
)
def test_a_run_with_an_environment_has_the_controls_that_its_data_allow(
    micro_config, tmp_path, monkeypatch, column, kinds
):
    rows = [{"question": f"Game {n}: find {n % 5}", "start": n % 5, "answer": f"<<{n % 5}=yes>>"} for n in range(40)]
    for name, some in (("train", rows[:30]), ("test", rows[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    options = {
        "data": {"name": str(tmp_path), "solution_column": column, "validation": 4},
        "environment": f"{CASES}/guessing.py:Guess",
        "rewards": [],
        "rollout.max_completion_tokens": 24,
        "sft.steps": 0 if column is None else 1,
        "steps": 1,
        "eval.limit": 4,
    }
    train(micro_config(tmp_path / "run", **options))
    monkeypatch.setattr(module, "_seconds", lambda folder: 0.05)
    for name in ("TIMED", "UNTIMED", "POINTS"):
        monkeypatch.setattr(module, name, 1)
    result = control(tmp_path / "run", QUIET)
    assert set(result["chosen"]) == kinds
    assert set(result["results"]) == {"start", "grpo"} | kinds


def test_a_run_of_0_2_that_had_set_what_left_has_controls(finished, tmp_path):
    saved = (finished[0] / "config.yaml").read_text()
    (tmp_path / "policy").mkdir()
    (tmp_path / "config.yaml").write_text(saved + "cassette: {file: answers.jsonl}\n")
    assert module._config(tmp_path) == module._config(finished[0])


def test_runs_without_a_control_are_refused(finished, tmp_path, capsys):
    folder, _ = finished
    assert main(["control", str(tmp_path / "nowhere")]) == 1
    assert "has no config.yaml" in capsys.readouterr().err
    assert main(["control", str(folder / "control" / "supervised_whole")]) == 1
    assert "is a run of quartet sft" in capsys.readouterr().err
    (tmp_path / "policy").mkdir()
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved | {"eval": saved["eval"] | {"limit": 0}}))
    assert main(["control", str(tmp_path)]) == 1
    assert "eval.limit is 0" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, -5])
def test_a_control_is_chosen_by_one_problem_at_least(tmp_path, capsys, count):
    """-5 had kept none, so no control was saved, and the evaluation failed after all training; 0 was 256."""
    assert main(["control", str(tmp_path), "--validation", str(count)]) == 1
    assert f"--validation {count}: give 1 or more" in capsys.readouterr().err
