"""The rollouts that a run has recorded, as they are read again: a file a step, a line a completion."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

from rewards.config.json_file import read_objects
from rewards.episode import ToolStats


def read_rollouts(output_dir: Path, step: int) -> list[dict[str, Any]]:
    """The completions of a step, group by group. Raises FileNotFoundError naming the steps that there are, ValueError
    for a damaged file."""
    path = rollout_path(output_dir, step)
    if not path.exists():
        steps = recorded_steps(output_dir)
        there = f"there are steps {steps[0]} to {steps[-1]}" if steps else "there are none"
        raise FileNotFoundError(f"no rollouts of step {step} in {path.parent}; {there}")
    try:
        text = zstandard.ZstdDecompressor().decompress(path.read_bytes())
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    lines = read_objects(path, text.removesuffix(b"\n").split(b"\n"))
    for number, line in enumerate(lines, start=1):
        if fault := _rollout_fault(line):
            raise ValueError(f"{path}, line {number} is damaged: {fault}")
    return lines


def split_groups(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A group begins with its sample 0.

    >>> split_groups([{"sample": 0}, {"sample": 1}, {"sample": 0}])
    [[{'sample': 0}, {'sample': 1}], [{'sample': 0}]]
    """
    groups: list[list[dict[str, Any]]] = []
    for line in lines:
        if line["sample"] == 0 or not groups:
            groups.append([])
        groups[-1].append(line)
    return groups


def recorded_steps(output_dir: Path) -> list[int]:
    """The steps whose rollouts are there, ascending; other files are passed over."""
    steps = (step_of(path) for path in (output_dir / "rollouts").glob("step_*.jsonl.zst"))
    return sorted(step for step in steps if step is not None)


def rollout_path(output_dir: Path, step: int) -> Path:
    return output_dir / "rollouts" / f"step_{step:06d}.jsonl.zst"


def step_of(rollout_path: Path) -> int | None:
    """The step of a record, whole or being written; None of any other file."""
    name = re.fullmatch(r"step_([0-9]{1,18})\.jsonl\.(zst|partial)", rollout_path.name)
    return int(name[1]) if name else None


def is_metric(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < math.inf and abs(value) <= sys.float_info.max)


def null_for_nan(value: object) -> object:
    """Return what JSON takes: None for numbers that are not finite, also in lists and mappings.

    >>> null_for_nan({"reward": float("nan"), "logprobs": [-0.5]})
    {'reward': None, 'logprobs': [-0.5]}
    """
    if isinstance(value, dict):
        return {key: null_for_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rollout_fault(line: dict[str, Any]) -> str | None:
    """Tells what a recorded completion lacks of what its readers need, or None."""
    kinds = {"prompt_id": str, "prompt": str, "sample": int, "text": str, "token_ids": list, "parts": dict}
    for name, kind in (kinds | {"extras": dict}).items():
        if not isinstance(line.get(name), kind):
            return f"its {name!r} is {line.get(name)!r:.60}"
    if "tools" in line and (fault := _episode_fault(line)):
        return fault
    marks = {"reward": line.get("reward"), **line["parts"]}
    return next((f"its {name!r} is {mark!r:.60}" for name, mark in marks.items() if not is_metric(mark)), None)


def _episode_fault(line: dict[str, Any]) -> str | None:
    turns, tools = line.get("turns"), line["tools"]
    if not isinstance(turns, list) or not all(map(_is_message, turns)):
        return f"its 'turns' is {turns!r:.60}"
    if not isinstance(tools, dict) or tools.keys() != ToolStats.__dataclass_fields__.keys():
        return f"its 'tools' is {tools!r:.60}"
    failure = tools["failure"]
    known = failure is None or (isinstance(failure, dict) and {"kind", "message"} <= failure.keys())
    return None if known and is_metric(tools["reward"]) else f"its 'tools' is {tools!r:.60}"


def _is_message(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
