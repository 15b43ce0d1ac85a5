"""JSON that others wrote: what Python's reader lets through, or fails on, is refused with a message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_NESTED = 100  # lists and objects inside each other; Python's own limit is near 1,000, and depends on the caller


def parse_json(text: str | bytes) -> Any:
    """The value in `text`. Raises ValueError: no JSON, not UTF-8, a key twice in an object, nested too deeply."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_no_key_twice)
    except RecursionError:
        raise ValueError(f"nested more than {MOST_NESTED} levels deep") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """The value in a file, which is a `kind`. Raises ValueError naming the file, OSError where it cannot be read."""
    return _checked(path.read_bytes(), kind, str(path))


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without the last one if it is incomplete (being written, or its writer was killed)."""
    return path.read_bytes().split(b"\n")[:-1]


def read_objects(path: Path, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The object on every line. Raises ValueError naming file and line."""
    return [_checked(line, dict, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _checked(text: bytes, kind: type, where: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where} is damaged: it holds a {type(value).__name__}, not a {kind.__name__}")
    return value


@contextmanager
def expecting(path: Path | str, what: str) -> Iterator[None]:
    """Surrounds code that takes a parsed file apart: raises ValueError with the file's name where something is missing
    or has another type."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is no {what}, or it is damaged: {type(error).__name__}: {error}") from error


def unfit(value: object, level: int = 0) -> str | None:
    """Says why tokenizers, rewards and records cannot take `value`, or None: a lone surrogate, or nested too deeply.

    >>> unfit({"question": "q37\\ud83d"})
    "holds the lone surrogate '\\\\ud83d', half a character"
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"holds the lone surrogate {value[error.start]!r}, half a character"
    elif isinstance(value, dict | list):
        if level == MOST_NESTED:
            return f"is nested more than {MOST_NESTED} levels deep"
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((fault for part in parts if (fault := unfit(part, level + 1))), None)
    return None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {name!r:.100} is there twice; keep one")
        content[name] = value
    return content


def write_json(path: Path, content: object) -> None:
    """Writes JSON for a person and for programs: indented, and in UTF-8. Folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")  # lone surrogates, as JSON escapes


def with_inner(row: object, names: Iterable[str]) -> object:
    """The row with a column for each of the names that is a value inside a column; what is no row stays as it is.

    >>> with_inner({"reward_model": {"ground_truth": "42"}}, ["reward_model.ground_truth"])
    {'reward_model': {'ground_truth': '42'}, 'reward_model.ground_truth': '42'}
    """
    if isinstance(row, dict):
        for name in [name for name in names if "." in name and name not in row]:
            value: Any = row
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            row = row if value is None else {**row, name: value}
    return row
