"""`quartet control`: what a run's start becomes without GRPO, in the same seconds and on the same held-out problems.

Two controls. Supervised steps on all solutions that the run had, where the rate and the number of steps are chosen on
validation problems. And rejection sampling: the run's own loop, in which each step learns from the policy's correct
completions only, all with the same weight (RAFT, arXiv 2304.06767, and expert iteration).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.table import Column, Table

from grpo.cli.commands.eval import ModelEvaluation, evaluate_model
from grpo.cli.commands.eval_report import pairs
from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.config.learner import SftLearnerOptions
from grpo.config.run import EvalOptions, RunConfig, SftConfig, TrainConfig
from grpo.config.sampling import SamplingOptions
from grpo.evaluation.best_point import BestPoint
from grpo.run import hardware
from grpo.session import Session
from grpo.task.task import Task
from policies.files.atomic import write_file
from review.readers.run_folder import CONTROL, CONTROL_FROM_BEGINNING, read_events, read_metrics
from rewards.config.names import recorded_options
from rewards.config.options import load
from rewards.group_score import GroupScore
from rewards.verdicts import held_out_metric

if TYPE_CHECKING:
    from grpo.evaluation.evaluate import Evaluation

RATES = (1.0, 0.3)  # of the run's supervised rate, from the start of GRPO
POINTS = 5  # at which a control answers the held-out problems
TIMED, UNTIMED = 10, 3  # steps of a short run that tell what a step takes; the first ones are slower
VALIDATION = 256  # problems, where the run kept none

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Candidate:
    """One training that may be a control. It begins with `model`, and has `seconds`."""

    name: str
    kind: str
    words: str
    model: str
    seconds: float
    rate: float


def control(folder: Path, console: Console, validation: int | None = None) -> dict[str, Any]:
    """Train the controls of a finished run into `folder/control/`, evaluate them beside it, and return what
    `control.json` there holds. A control that is there already is not trained again.

    A run whose data have no solutions has rejection sampling as its only control.

    Raises ValueError for a folder that is not a finished run of `quartet train` with held-out problems, or one of an
    agent.
    """
    if validation is not None and validation < 1:
        raise ValueError(f"--validation {validation}: give 1 or more, or leave it out")
    config = _config(folder)
    data = [
        source.model_copy(update={"validation": validation or source.validation or VALIDATION})
        for source in config.data
    ]
    config = config.model_copy(update={"data": data})
    seconds = {"grpo": _seconds(folder), "start": _warm_seconds(folder)}
    trained = []
    for candidate in _candidates(folder, config, seconds):
        console.print(f"{candidate.words}, {candidate.seconds:.0f} s", markup=False, highlight=False)
        trained.append(_train(folder, config, candidate))
    supervised = [each for each in trained if each["kind"] == "supervised"]
    chosen = [each for each in trained if each["kind"] == "rejection"]
    if supervised:
        chosen.insert(0, max(supervised, key=_validation))  # the held-out problems have no say in it
    result = _evaluate(folder, config, seconds, chosen, console)
    result["candidates"] = trained
    write_file(folder / CONTROL, json.dumps(result, indent=1) + "\n")
    return result


def _config(folder: Path) -> TrainConfig:
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"RUN={folder}: has no config.yaml; name the folder of a run of quartet train")
    command, _ = recorded_options(file)
    if command != "train":
        raise ValueError(f"RUN={folder}: is a run of quartet {command}; only a run of quartet train has controls")
    config = load(TrainConfig, file, {}, on_removed=lambda text: None)
    if not (folder / "policy").is_dir():
        raise ValueError(f"RUN={folder}: has no policy/, so it has not ended; finish it with --resume auto")
    if not config.eval.limit:
        raise ValueError(f"RUN={folder}: eval.limit is 0, so nothing is held out; run it with eval.limit: 512")
    if config.agent:
        raise ValueError(f"RUN={folder}: trains an agent, for which there is no control yet")
    return config


def _seconds(folder: Path) -> float:
    """Seconds of the steps of GRPO, without evaluations."""
    return sum(row.get("time/step", 0.0) for row in read_metrics(folder))


def _warm_seconds(folder: Path) -> float:
    """Seconds of the supervised steps before GRPO."""
    return sum(event["seconds"] for event in read_events(folder) if event["event"] == "warm_start_done")


def _candidates(folder: Path, config: TrainConfig, seconds: dict[str, float]) -> list[Candidate]:
    start = str(folder / "warm_start") if config.sft.steps else config.model
    rate, budget = config.sft.learning_rate, seconds["grpo"]
    of_grpo = config.learner.learning_rate
    words = f"rejection sampling, rate {of_grpo:g}, {config.learner.schedule}"
    rejection = Candidate("rejection", "rejection", words, start, budget, of_grpo)
    if any(source.solution_column is None for source in config.data):
        return [rejection]
    found = [
        Candidate(
            f"supervised_{rate * share:g}",
            "supervised",
            f"supervised steps from the start of GRPO, rate {rate * share:g}, decaying",
            start,
            budget,
            rate * share,
        )
        for share in RATES
    ]
    if config.sft.steps:
        words = f"supervised steps from the beginning, one decay over all seconds, rate {rate:g}"
        whole = budget + seconds["start"]
        found.append(Candidate(CONTROL_FROM_BEGINNING, "supervised", words, config.model, whole, rate))
    return [*found, rejection]


def _validation(trained: Mapping[str, Any]) -> float:
    """How well a control answers the validation problems; below every other one if none of its answers has a score."""
    value = trained["validation"]
    return -math.inf if value is None else float(value)


def _train(folder: Path, config: TrainConfig, candidate: Candidate) -> dict[str, Any]:
    """Train a candidate, unless it is there. Returns its folder, seconds, steps, validation and curve."""
    own = folder / "control" / candidate.name
    record = own / "candidate.json"
    if record.is_file():
        return dict(json.loads(record.read_text(encoding="utf-8")))
    loop, options = (_supervise, _supervised) if candidate.kind == "supervised" else (_reject, _rejecting)
    shutil.rmtree(own, ignore_errors=True)
    short = own.with_name(f"{candidate.name}_timed")
    shutil.rmtree(short, ignore_errors=True)
    loop(options(config, candidate, short, TIMED + UNTIMED), timed=True)
    a_step = median(row["time/step"] for row in read_metrics(short) if row["step"] > UNTIMED)
    shutil.rmtree(short)
    steps = max(1, round(candidate.seconds / a_step))
    best = loop(options(config, candidate, own, steps), timed=False)
    assert best is not None
    result = {
        "name": candidate.name,
        "kind": candidate.kind,
        "words": candidate.words,
        "steps": steps,
        "seconds": _seconds(own),
        "best_step": best.step,
        "validation": best.value,
        "curve": curve(own),
    }
    write_file(record, json.dumps(result, indent=1) + "\n")
    return result


def curve(folder: Path) -> list[dict[str, float]]:
    """Held-out accuracy, or mean reward where there is none, by seconds of training: a point for each evaluation."""
    rows = read_metrics(folder)
    metric = held_out_metric(rows)
    seconds, points = 0.0, []
    for row in rows:
        seconds += row.get("time/step", 0.0)
        if metric in row:
            point = {"step": row["step"], "seconds": round(seconds, 1), "problems": row["eval/prompts"]}
            points.append(point | {"sampled": row[metric], "greedy": row[f"{metric}_greedy"]})
    return points


def _supervised(config: TrainConfig, candidate: Candidate, own: Path, steps: int) -> SftConfig:
    rates = {"learning_rate": candidate.rate, "schedule": "linear", "warmup_steps": config.sft.warmup_steps}
    learner = {name: getattr(config.learner, name) for name in SftLearnerOptions.model_fields} | rates
    kept = {name: getattr(config, name) for name in SftConfig.model_fields if name in TrainConfig.model_fields}
    of_control = {
        "model": candidate.model,
        "output_dir": own,
        "steps": steps,
        "prompts_per_step": config.sft.batch_size,
        "learner": learner,
        "mtp": {"loss_weight": 0.0},  # seconds for the base model only
        "rollout": {name: getattr(config.rollout, name) for name in SamplingOptions.model_fields},
        "eval": {name: getattr(config.eval, name) for name in EvalOptions.model_fields},
        "checkpoint": {"every": steps},
        "log": {"trackers": []},
    }
    return SftConfig.model_validate(kept | of_control)


def _supervise(config: SftConfig, timed: bool) -> BestPoint | None:
    """The loop of `quartet sft`, with a look at the validation problems and at the held-out ones."""
    with Session.open(_unevaluated(config) if timed else config) as session:
        best = BestPoint(session, config.output_dir / "best_policy")
        session.held_out.every = max(1, config.steps // POINTS)
        for step in session.run.steps():
            batch = session.prepare_solutions(session.solutions(config.prompts_per_step))
            metrics = session.learn(batch)
            session.record(step, metrics)
            if not timed:
                best.look(step)
                session.evaluate_if_due(step)
        session.finish()
        return best


def _rejecting(config: TrainConfig, candidate: Candidate, own: Path, steps: int) -> TrainConfig:
    of_control = {
        "model": candidate.model,
        "output_dir": own,
        "steps": steps,
        "sft": config.sft.model_copy(update={"steps": 0}),
        "eval": config.eval.model_copy(update={"every": None}),
        "checkpoint": config.checkpoint.model_copy(update={"every": steps, "keep_best": False}),
        "log": config.log.model_copy(update={"trackers": []}),
    }
    return config.model_copy(update=of_control)


def _reject(config: TrainConfig, timed: bool) -> BestPoint | None:
    """The loop of `quartet train`, in which the advantage of a correct completion is 1 and that of any other is 0."""
    with Session.open(_unevaluated(config) if timed else config) as session:
        best = BestPoint(session, config.output_dir / "best_policy")
        session.held_out.every = max(1, config.steps // POINTS)
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            scores = session.score(groups)
            correct = [_correct(session.task, score) for score in scores]
            batch = session.prepare(groups, scores, correct)
            metrics = session.learn(batch)
            session.sync_weights()
            session.record(step, metrics)
            if not timed:
                best.look(step)
                session.evaluate_if_due(step)
        session.finish()
        return best


def _correct(task: Task, score: GroupScore) -> list[float]:
    """1 for each correct completion of a group; where the reward has no verdicts, for the best ones of a group."""
    marks = score.parts[task.first_reward]
    verdicts = [task.verdicts.of(mark) for mark in marks]
    if any(verdict is not None for verdict in verdicts):
        return [float(verdict is True) for verdict in verdicts]
    best = max((mark for mark in marks if mark is not None), default=None)
    return [float(mark is not None and mark == best) for mark in marks]


def _unevaluated(config: Config) -> Config:
    return config.model_copy(update={"eval": config.eval.model_copy(update={"limit": 0})})


def _evaluate(
    folder: Path, config: TrainConfig, seconds: dict[str, float], controls: Sequence[dict[str, Any]], console: Console
) -> dict[str, Any]:
    """All policies on the held-out problems with the same noise, and how far GRPO is above each of the others."""
    start = folder / "warm_start" if config.sft.steps else Path(config.model)
    policies = {"start": start, "grpo": folder / "policy"}
    policies |= {each["kind"]: folder / "control" / each["name"] / "best_policy" for each in controls}
    options = EvalConfig.model_validate(defaults_of_run(folder) | {"model": str(folder), "threads": config.threads})
    evaluations: dict[str, ModelEvaluation] = {}
    for name, policy in policies.items():
        evaluations[name] = evaluate_model(options.model_copy(update={"model": str(policy)}), console)
    results = {}
    for name, evaluation in evaluations.items():
        results[name] = {way: _figures(result) for way, result in evaluation.results.items()}
    differences = {
        name: {way: vars(pair) for way, pair in pairs(evaluations[name], evaluations["grpo"]).items()}
        for name in policies
        if name != "grpo"
    }
    return {
        "run": str(folder),
        "seed": config.seed,
        "seconds": seconds,
        "problems": evaluations["grpo"].problems,
        "chosen": {each["kind"]: each for each in controls},
        "grpo_curve": curve(folder),
        "results": results,
        "grpo_minus": differences,
        "environment": hardware.describe(),
    }


def _figures(result: Evaluation) -> dict[str, Any]:
    return {"accuracy": result.accuracy, "interval_95": result.interval, "reward_mean": result.reward_mean}


NAMES = {
    "start": "start",
    "grpo": "GRPO",
    "supervised": "supervised steps",
    "rejection": "rejection sampling",
}


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row for each policy: its seconds, its accuracy, and how far GRPO is above it on the same problems."""
    numbers = ("seconds", "sampled", "greedy", "GRPO above it by")
    columns = [Column(name, justify="right") for name in numbers]
    is_accuracy = result["results"]["grpo"]["sampled"]["accuracy"] is not None
    measure, ending = ("accuracy", ", 95 % intervals") if is_accuracy else ("mean reward", "")
    title = f"{measure} on {result['problems']:,} held-out problems{ending}"
    table = Table("policy", *columns, title=title, title_justify="left")
    for name, ways in result["results"].items():
        pair = result["grpo_minus"].get(name, {}).get("sampled")
        gain = "" if pair is None else _difference(pair)
        table.add_row(NAMES[name], f"{_took(result, name):,.0f}", _words(ways["sampled"]), _words(ways["greedy"]), gain)
    console.print(table)
    reasons: dict[str, None] = {}  # each once
    for ways in result["grpo_minus"].values():
        reasons |= dict.fromkeys(pair.get("why_no_interval") for pair in ways.values())
    for reason in filter(None, reasons):
        console.print(reason, highlight=False, soft_wrap=True)


def _took(result: dict[str, Any], name: str) -> float:
    """Seconds of training, those of the start by itself and those of the others after it."""
    if name in result["seconds"]:
        return float(result["seconds"][name])
    chosen = result["chosen"][name]
    before = result["seconds"]["start"] if chosen["name"] == CONTROL_FROM_BEGINNING else 0.0
    return float(chosen["seconds"] - before)


def _difference(pair: dict[str, Any]) -> str:
    if pair["low"] is None:
        return f"{pair['value']:+.2f} (no interval)"
    return f"{pair['value']:+.2f} ({pair['low']:+.2f} to {pair['high']:+.2f})"


def _words(figures: dict[str, Any]) -> str:
    if figures["accuracy"] is None:
        return "-" if figures["reward_mean"] is None else f"{figures['reward_mean']:.3f}"
    low, high = figures["interval_95"]
    return f"{figures['accuracy']:.3f} ({low:.2f}-{high:.2f})"
