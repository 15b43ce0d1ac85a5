"""Files of one JSON object a line, which grow at their end: every line is whole, or not there."""

from __future__ import annotations

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

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
        return json.dumps(_null_for_nan(values), allow_nan=False, default=str) + "\n"


def _null_for_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _null_for_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
