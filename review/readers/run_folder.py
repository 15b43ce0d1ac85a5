"""What a run has written: metrics, events and rollouts are read, and what came after a step is taken back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from policies.files.atomic import write_file
from rewards.config.json_file import expecting, read_objects, whole_lines
from rewards.group_score import GroupScore
from rewards.records import is_metric, step_of
from rewards.verdicts import held_out_metric
from rollout.group import RolloutGroup

TURNS = ("begin", "resume", "end")  # events; the last of them says whether a run goes on
CONTROL = "control/control.json"  # in a run folder: what `quartet control` found
HELD_OUT = "held_out.jsonl"
CONTROL_FROM_BEGINNING = "supervised_whole"  # the control that begins before the SFT stage, so it has its seconds too


def check_run(folder: Path) -> Path:
    """The folder itself. Raises ValueError for one that holds no run."""
    if not folder.is_dir():
        raise ValueError(f"RUN={folder}: there is no such folder")
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"RUN={folder}: is no run folder (no metrics.jsonl in it)")
    return folder


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """One dict a step, steps ascending; the eval/* line of a step is merged into it.

    >>> read_metrics(Path("runs/demo"))[1]
    {'step': 1, 'completion/length_mean': 23.1, ..., 'eval/accuracy': 0.46}
    """
    steps: dict[int, dict[str, Any]] = {}
    path = output_dir / "metrics.jsonl"
    for line in _measured(path, whole_lines(path)):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def read_events(output_dir: Path) -> list[dict[str, Any]]:
    """The events of a run in their order. Lines that are no event (of a writer that was killed) are left out."""
    path = output_dir / "events.jsonl"
    events = []
    for line in whole_lines(path) if path.exists() else []:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        events += [event] if isinstance(event, dict) and "event" in event else []
    return events


def read_problems(output_dir: Path, metric: str) -> dict[int, dict[str, float | None]]:
    """What each held-out problem got by `metric`, by step and prompt_id: of the evaluations that have a record, which
    are the first and the last one. Of several records of a step the last one counts. Raises ValueError for a damaged
    file."""
    path = output_dir / HELD_OUT
    if not path.is_file():
        return {}
    with expecting(path, "record of held-out problems"):
        lines = read_objects(path, whole_lines(path))
        return {int(line["step"]): dict(line["by_problem"]) for line in lines if line["metric"] == metric}


def rollout_lines(
    groups: Sequence[RolloutGroup],
    scores: Sequence[GroupScore],
    advantages: Sequence[Any],
    policy_logprobs: Mapping[int, Sequence[float]] | None = None,
) -> list[dict[str, Any]]:
    """The record of each completion. `advantages` [P, G]; `policy_logprobs` are the learner's, by [group, sample]
    flattened, and null for a completion from which nothing was to be learned."""
    lines: list[dict[str, Any]] = []
    for group, score, row in zip(groups, scores, advantages, strict=True):
        for sample, (completion, advantage) in enumerate(zip(group.completions, row, strict=True)):
            learned = {}
            if policy_logprobs is not None:
                values = policy_logprobs.get(len(lines))
                learned = {"policy_logprobs": None if values is None else [round(value, 6) for value in values]}
            lines.append(
                {
                    "prompt_id": group.prompt.prompt_id,
                    "prompt": group.prompt.text,
                    **({"messages": group.prompt.messages} if group.prompt.messages else {}),
                    "sample": sample,
                    "text": completion.text,
                    "token_ids": completion.token_ids,
                    "logprobs": completion.logprobs,
                    **learned,
                    "reward": score.rewards[sample],
                    "parts": {name: values[sample] for name, values in score.parts.items()},
                    "extras": {name: values[sample] for name, values in score.extras.items()},
                    "advantage": advantage,
                    "finish_reason": completion.finish_reason,
                    **completion.episode,
                    "policy_version": completion.policy_version,
                    **({"policy_versions": completion.versions} if completion.versions else {}),
                    "draft": asdict(completion.draft),
                }
            )
    return lines


def holds_a_run(output_dir: Path) -> bool:
    """A folder where a run was refused or failed before its first step holds none."""
    metrics = output_dir / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or (output_dir / "checkpoints").exists()


def truncate(output_dir: Path, step: int) -> None:
    """Remove what came after `step`; with 0 the evaluation before the first step too: it is made again."""
    last = step or -1
    if (output_dir / "metrics.jsonl").exists():
        keep_lines(output_dir, lambda line: line["step"] <= last)
    for path in (output_dir / "rollouts").glob("step_*"):
        if (number := step_of(path)) is not None and (number > step or path.suffix == ".partial"):
            path.unlink()


def keep_lines(output_dir: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    path = output_dir / "metrics.jsonl"
    lines = whole_lines(path)
    content = [line + b"\n" for line, row in zip(lines, _measured(path, lines), strict=True) if stays(row)]
    write_file(path, b"".join(content))


def is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)


def _measured(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises ValueError naming the line that holds no step, or what is no number."""
    rows = read_objects(path, lines)
    for number, row in enumerate(rows, start=1):
        if type(step := row.get("step")) is not int or not 0 <= step < 1e9:
            raise ValueError(f"{path}, line {number} is damaged: its step is {step!r:.60}; remove the line")
        if wrong := [name for name, value in row.items() if not is_metric(value)]:
            fault = f"{wrong[0]!r:.60} is {row[wrong[0]]!r:.60}, no finite number"
            raise ValueError(f"{path}, line {number} is damaged: {fault}; remove the line")
    return rows


def best_step(lines: Sequence[Mapping[str, Any]], saved: Collection[int], window: int | None = None) -> int | None:
    """The step of `saved` that did best on held-out problems, the latest of equals; None where none was evaluated.

    By eval/accuracy, or by eval/reward_mean where the reward's marks do not say right or wrong. With a `window`: by
    reward/mean, on average over so many steps up to it. `lines`: `read_metrics`.

    >>> best_step([{"step": 1, "eval/accuracy": 0.5}, {"step": 2, "eval/accuracy": 0.4}], saved=[1, 2])
    1
    """
    name = held_out_metric(lines) if window is None else "reward/mean"
    known = {line["step"]: line[name] for line in lines if line.get(name) is not None}
    values = {}
    for step in saved:
        near = [known[s] for s in range(step - (window or 1) + 1, step + 1) if s in known]
        if near:
            values[step] = fmean(near)
    return max(values, key=lambda step: (values[step], step), default=None)
