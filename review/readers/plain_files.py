"""Reads a run folder that a stranger may have made: plain files of a bounded size."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import zstandard

from rewards.records import read_rollouts, rollout_path

MOST_BYTES = 2**29  # of a file, and of a record when it is unpacked; as Python objects they take five times as much
HEADER_BYTES = 18  # the longest header of a zstandard frame


def check_files(*paths: Path) -> None:
    """Raises ValueError for a pipe, a device or a folder, and for a file that is too large. A missing file passes."""
    for path in paths:
        if not path.exists():
            continue
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no plain file, so it is not read")
        _check_size(path, status.st_size, "has")


def read_step(folder: Path, step: int) -> list[dict[str, Any]]:
    """`read_rollouts` of a record that is a plain file and not too large. Raises ValueError for another one."""
    _check_record(rollout_path(folder, step))
    return read_rollouts(folder, step)


def has_prompt(folder: Path, step: int, prompt_id: str) -> bool:
    """Whether the record of a step may hold a completion of this prompt. Its lines are not parsed, which takes longer
    than to unpack them. Raises as `read_step`, and FileNotFoundError."""
    path = rollout_path(folder, step)
    _check_record(path)
    try:
        text = zstandard.ZstdDecompressor().decompress(path.read_bytes())
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return json.dumps(prompt_id).encode() in text


def _check_record(path: Path) -> None:
    check_files(path)
    if path.exists():
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        try:
            _check_size(path, zstandard.frame_content_size(header), "would unpack to")
        except zstandard.ZstdError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _check_size(path: Path, size: int, verb: str) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{path} {verb} {size / 2**20:,.0f} MiB; the page reads {MOST_BYTES / 2**20:,.0f} at most")
