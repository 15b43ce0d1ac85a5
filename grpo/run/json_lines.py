"""What a run writes, a JSON object a line: every line is whole, or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from policies.files.atomic import write_file
from review.readers.run_folder import measured_rows
from rewards.config.json_file import whole_lines
from rewards.group_score import GroupScore
from rewards.records import null_for_nan, step_of
from rollout.group import RolloutGroup

GONE = "was deleted, moved or replaced while the run wrote to it; put it back, and go on with --resume auto"


def open_lines(path: Path) -> FileIO:
    """Opens a file to append lines; half a line that a killed writer has left there goes."""
    stream = path.open("ab+", buffering=0)
    end = stream.seek(0, os.SEEK_END)
    while end:
        stream.seek(end - 1)
        if stream.read(1) == b"\n":
            break
        end -= 1
    stream.truncate(end)
    return stream


def append_line(stream: FileIO, values: dict[str, Any]) -> None:
    """A whole line or, where the disk refuses it, none. Raises FileNotFoundError where the file is no longer there, in
    which nobody would find the line."""
    line = json_line(values).encode()
    if not _is_there(stream):
        raise FileNotFoundError(f"{stream.name} {GONE}")
    end = stream.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[stream.write(line) :]
    except OSError as error:
        stream.truncate(end)
        raise OSError(error.errno, error.strerror, str(stream.name)) from error  # a full disk says on its own no name


def _is_there(stream: FileIO) -> bool:
    try:
        return os.path.samestat(os.stat(stream.name), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def json_line(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, allow_nan=False, default=str) + "\n"
    except ValueError:
        return json.dumps(null_for_nan(values), allow_nan=False, default=str) + "\n"


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
    content = [line + b"\n" for line, row in zip(lines, measured_rows(path, lines), strict=True) if stays(row)]
    write_file(path, b"".join(content))
