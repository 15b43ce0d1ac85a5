"""What `quartet control` has found about a run, as its page and `quartet compare` show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from review.readers.plain_files import check_files
from review.readers.run_folder import CONTROL, CONTROL_FROM_BEGINNING
from review.statistics.estimates import wilson_interval
from rewards.config.json_file import expecting, read_json
from rewards.records import is_metric

GRPO, START, SUPERVISED, REJECTION = "grpo", "start", "supervised", "rejection"
NAMES = {
    START: "start (SFT stage)",
    GRPO: "GRPO",
    SUPERVISED: "supervised steps",
    REJECTION: "rejection sampling",
}
WAYS = ("sampled", "greedy")  # how the held-out problems are answered
WAY_OUT = "`quartet control` writes it again after you remove it"


@dataclass(frozen=True)
class Measured:
    """A held-out accuracy, a mean reward, or a difference of two. Without bounds its interval is not known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Answer:
    """The held-out problems, sampled, after `seconds` of training since the SFT stage."""

    step: int
    seconds: float
    sampled: Measured


@dataclass(frozen=True)
class Policy:
    """A policy on the held-out problems. `seconds` count from the end of the SFT stage; `grpo_minus` is paired by
    problem, and empty for GRPO itself. `words` tell how a control was trained."""

    name: str
    seconds: float
    results: dict[str, Measured]
    grpo_minus: dict[str, Measured]
    curve: list[Answer]
    words: str = ""


@dataclass(frozen=True)
class ControlResult:
    """GRPO, its start and its controls on the same `problems`, by accuracy or, if no reward has verdicts, by reward."""

    problems: int
    is_accuracy: bool
    has_sft_stage: bool
    policies: dict[str, Policy]

    @property
    def grpo(self) -> Policy:
        return self.policies[GRPO]


def read_control(folder: Path) -> ControlResult | None:
    """The result of `quartet control` in a run folder, None without one. Raises ValueError naming a damaged file."""
    path = folder / CONTROL
    check_files(path)
    if not path.is_file():
        return None
    try:
        with expecting(path, "result of quartet control"):
            return _result(read_json(path))
    except ValueError as error:
        raise ValueError(f"{error}; {WAY_OUT}") from error


def _result(content: Mapping[str, Any]) -> ControlResult:
    evaluations = [figures for ways in content["results"].values() for figures in ways.values()]
    is_accuracy = all(figures["interval_95"] is not None for figures in evaluations)
    policies = {kind: _policy(kind, content, is_accuracy) for kind in NAMES if kind in content["results"]}
    if GRPO not in policies:
        raise ValueError("its results have no grpo")
    return ControlResult(int(_number(content["problems"])), is_accuracy, _sft_seconds(content) > 0, policies)


def _sft_seconds(content: Mapping[str, Any]) -> float:
    return _number(content["seconds"]["start"])


def _policy(kind: str, content: Mapping[str, Any], is_accuracy: bool) -> Policy:
    training = _training(kind, content)
    whole = training["name"] == CONTROL_FROM_BEGINNING
    before = _sft_seconds(content) if whole else 0.0  # its own steps before GRPO began
    curve = [_answer(point, before, is_accuracy) for point in training["curve"]]
    results = content["results"][kind]
    differences = {} if kind == GRPO else content["grpo_minus"][kind]
    return Policy(
        "start" if kind == START and not _sft_seconds(content) else NAMES[kind],
        max(0.0, _number(training["seconds"]) - before),
        {way: _measured(results[way], is_accuracy) for way in WAYS if way in results},
        {way: _difference(differences[way]) for way in WAYS if way in differences},
        [answer for answer in curve if answer.seconds >= 0],
        str(training["words"]),
    )


def _training(kind: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The training that made a policy: none since the SFT stage made the start."""
    if kind == GRPO:
        return {"name": kind, "words": "", "seconds": content["seconds"][kind], "curve": content["grpo_curve"]}
    if kind == START:
        return {"name": kind, "words": "", "seconds": 0.0, "curve": []}
    chosen: Mapping[str, Any] = content["chosen"][kind]
    return chosen


def _answer(point: Mapping[str, Any], before: float, is_accuracy: bool) -> Answer:
    value, problems = _number(point["sampled"]), _number(point["problems"])
    bounds = wilson_interval(value * problems, problems) if is_accuracy and problems > 0 else ()
    return Answer(int(_number(point["step"])), _number(point["seconds"]) - before, Measured(value, *bounds))


def _measured(figures: Mapping[str, Any], is_accuracy: bool) -> Measured:
    if not is_accuracy:
        return Measured(_number(figures["reward_mean"]))  # rewards have no limits, so no interval of a share
    low, high = figures["interval_95"]
    return Measured(_number(figures["accuracy"]), _number(low), _number(high))


def _difference(pair: Mapping[str, Any]) -> Measured:
    if pair["low"] is None or pair["high"] is None:
        return Measured(_number(pair["value"]))
    return Measured(_number(pair["value"]), _number(pair["low"]), _number(pair["high"]))


def _number(value: Any) -> float:
    if value is None or not is_metric(value):
        raise ValueError(f"{value!r:.60} is no finite number")
    return float(value)
