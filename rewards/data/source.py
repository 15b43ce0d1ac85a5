"""Where the rows of a dataset come from: a file, a folder or the hub.

`datasets` reads Parquet files and the hub. JSON and CSV files are read here, because tests in tests/rewards/data hold
what `datasets` does not do. A row that is not JSON, holds half a character or is nested too deeply ends its reading, so
that the other bad rows are never named. It renames a CSV column that is there twice, reads empty and missing fields as
the same None, and turns texts that look like dates or numbers into these (2026-01-31 into a datetime, 007 into 7.0).
"""

from __future__ import annotations

import codecs
import csv
import difflib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from rewards.config.json_file import parse_json

GSM8K = "openai/gsm8k:main"
MADE = ("word_problems", "letter_sorting", "word_game")  # here, by a seed, with a split `held_out` of their own
BUILT_IN = {**{name: name for name in MADE}, "gsm8k": GSM8K, "openai/gsm8k": GSM8K}
REASONING_GYM = "reasoning_gym:"  # and the name of a task
FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv")
TOO_MANY_FIELDS = "fields beyond the header"


def local_file(source: str, split: str) -> Path | None:
    """The file that `source` names, or None if it can only be a hub id. Raises FileNotFoundError and ValueError."""
    path = Path(source).expanduser()
    if path.is_dir():
        candidates = [path / f"{split}{kind}" for kind in FILE_KINDS]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            there = ", ".join(sorted(child.name for child in path.iterdir())) or "nothing"
            names = ", ".join(candidate.name for candidate in candidates)
            raise FileNotFoundError(f"{path} holds none of {names}; it holds {there}")
        return file
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ValueError(f"{path} cannot be read; the kinds of file that can be are {', '.join(FILE_KINDS)}")
        return path
    if path.suffix in FILE_KINDS or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {source!r} (looked from {Path.cwd()})")
    if "/" not in source and (near := difflib.get_close_matches(source, BUILT_IN, n=1, cutoff=0.8)):
        raise ValueError(f"there is no dataset {source!r}; did you mean {near[0]!r}?")
    return None


def file_rows(path: Path) -> Iterable[tuple[int, Any]]:
    """(row number from 1, row). A row of a .jsonl file that cannot be read is the ValueError that it raised."""
    if path.suffix == ".jsonl":
        # not splitlines(): JSON strings may hold U+2028, which ends a line for Python and not for JSON
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        return [(number, _json_or_error(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".json":
        rows = _json_or_error(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        if not isinstance(rows, list):
            fault = rows if isinstance(rows, ValueError) else f"it holds a {type(rows).__name__}"
            raise ValueError(f"{path} must hold a JSON list of objects: {fault}")
    elif path.suffix == ".csv":
        rows = _csv_rows(path)
    else:
        rows = load_dataset("parquet", data_files=str(path), split="train")
    return enumerate(rows, start=1)


def _csv_rows(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey=TOO_MANY_FIELDS, strict=True)
        try:
            header = reader.fieldnames or []
            if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
                raise ValueError(f"{path}: the header has the column {twice[0]!r} twice; rename or remove one")
            return list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not CSV in UTF-8: {error} (after line {reader.line_num})") from error


def _json_or_error(text: bytes) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        return error


def load_dataset(name: str, subset: str | None = None, **options: object) -> Iterable[Any]:
    source = ", ".join([name, *([subset] if subset else []), *map(str, options.values())])
    try:
        import datasets  # slow to import
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the dataset {source} needs the package {error.name}: pip install 'quartet-rewards[datasets]', or give a "
            "file of JSON or CSV"
        ) from error
    why = "" if "data_files" in options else _silence_of_the_hub()
    if why:
        datasets.config.HF_HUB_OFFLINE = True
        why += ", and only the cache can be used. "
    try:
        return datasets.load_dataset(name, subset, **options)
    except Exception as error:
        raise ValueError(
            f"could not load the dataset {source}: {error.__cause__ or error}\n"
            f"{why}Check the name, or give a file, or a folder with train.jsonl and test.jsonl."
        ) from error


def _silence_of_the_hub() -> str:
    """Says why the hub does not answer, where quartet-rl is there, which asks it once and briefly."""
    try:
        return str(import_module("policies.files.hub").unreachable())
    except ModuleNotFoundError:  # the hub's libraries find out themselves, which takes a minute
        return ""
