"""From a dataset to examples: where the rows come from, and what is checked before a run may start."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from grpo.word_problems import word_problems

GSM8K = "openai/gsm8k:main"
GSM8K_COPIES = ("data/gsm8k", "../shared/data/gsm8k")  # train.jsonl and test.jsonl here spare the hub
BUILT_IN = {"word_problems": "word_problems", "gsm8k": GSM8K, "openai/gsm8k": GSM8K}
FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv")
EVALUATION_SPLITS = ("test", "heldout", "all")
MOST_BAD_ROWS_NAMED = 10
TOO_MANY_FIELDS = "fields beyond the header"

_CALCULATOR_MARK = re.compile(r"<<[-+*/().=\d]*>>")


@dataclass(frozen=True)
class Example:
    """One problem. `solution` is ready to train on (`clean_solution`); `columns` go to the rewards.

    >>> Example("gsm8k/train/0", "2 + 3 = ?", "2 + 3 = 5\\n#### 5",
    ...         {"question": "2 + 3 = ?", "answer": "2 + 3 = <<2+3=5>>5\\n#### 5"}).example_id
    'gsm8k/train/0'
    """

    example_id: str
    question: str
    solution: str
    columns: dict[str, Any] = field(default_factory=dict)


def clean_solution(text: str) -> str:
    """Strip GSM8K's calculator marks.

    >>> clean_solution("Natalia sold 48/2 = <<48/2=24>>24 clips in May.")
    'Natalia sold 48/2 = 24 clips in May.'
    """
    return _CALCULATOR_MARK.sub("", text)


def load_examples(
    name_or_path: str | Path,
    split: str,
    *,
    purpose: Literal["train", "eval"] = "train",
    levels: Sequence[int] | None = None,
    limit: int | None = None,
    prompt_column: str = "question",
    solution_column: str | None = "answer",
    seed: int = 0,
) -> list[Example]:
    """The first `limit` examples of a dataset, every row checked.

    `name_or_path` is one of

    - `word_problems`, with `levels` (default [1]) and `seed`; 20,000 problems unless `limit` says otherwise,
    - `gsm8k` (from data/gsm8k or ../shared/data/gsm8k where such a folder exists, else from the hub), or any hub id,
      with its configuration behind a colon (`owner/name:config`),
    - a folder that holds `{split}.jsonl` (or .json, .parquet, .csv), or such a file, whatever `split` is.

    All columns of a row go to the rewards; question and solution also do as `question` and `answer` where the
    row has no columns of these names. `solution_column=None` is for data without solutions.

    Raises FileNotFoundError for a missing file, and ValueError for held-out data loaded with purpose "train",
    an unknown name, no rows, a missing column and bad rows (the first ten with number and reason).
    """
    if purpose not in ("train", "eval"):
        raise ValueError(f"purpose={purpose!r} is neither 'train' nor 'eval'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no examples; use 1 or more, or None for all")
    source = str(name_or_path)
    if not isinstance(name_or_path, Path):
        source = BUILT_IN.get(source, source)
    if levels is not None and source != "word_problems":
        raise ValueError(f"levels={list(levels)} are for word_problems; {name_or_path} has no levels")
    if purpose == "train":
        _refuse_evaluation_data(str(name_or_path), split, None)
    if source == GSM8K:
        source = next((folder for folder in GSM8K_COPIES if Path(folder).is_dir()), source)
    path = None if source in BUILT_IN.values() else _local_file(source, split)
    if purpose == "train":
        _refuse_evaluation_data(str(name_or_path), split, path)

    if source == "word_problems":
        problems = word_problems(split, [1] if levels is None else levels, seed, count=limit or 20_000)
        return [_example(row["id"], row, "question", "answer") for row in problems]
    if path:
        prefix = f"{path.resolve().parent.name}/{path.stem}"
        rows = _file_rows(path)
    else:
        name, _, config = source.partition(":")
        prefix = f"{name.split('/')[-1]}/{split}"
        rows = enumerate(_load_dataset(name, config or None, split=split), start=1)
    return _checked(list(islice(rows, limit)), prefix, str(path or source), prompt_column, solution_column)


def _local_file(source: str, split: str) -> Path | None:
    """The file that `source` names, or None where it can only be a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        candidates = [path / f"{split}{kind}" for kind in FILE_KINDS]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            there = ", ".join(sorted(child.name for child in path.iterdir())) or "nothing"
            wanted = ", ".join(candidate.name for candidate in candidates)
            raise FileNotFoundError(f"{path} holds none of {wanted}; it holds {there}")
        return found
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ValueError(f"{path} cannot be read; the kinds of file that can be are {', '.join(FILE_KINDS)}")
        return path
    if path.suffix in FILE_KINDS or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {source!r} (looked from {Path.cwd()})")
    if "/" not in source and (near := difflib.get_close_matches(source, BUILT_IN, n=1, cutoff=0.8)):
        raise ValueError(f"there is no dataset {source!r}; did you mean {near[0]!r}?")
    return None


def _refuse_evaluation_data(source: str, split: str, path: Path | None) -> None:
    # a split of the hub can be a sum of slices: "train+test[:50%]"
    names = [part.split("[")[0].strip() for part in split.split("+")] + ([path.stem] if path else [])
    if forbidden := [name for name in names if name in EVALUATION_SPLITS]:
        raise ValueError(
            f"{forbidden[0]!r} of {source} is for evaluation and must not be trained on; "
            "train on another split, or load it with purpose='eval'"
        )


def _file_rows(path: Path) -> Iterable[tuple[int, Any]]:
    """(row number, row); the row of a .jsonl line that is not JSON is the error that it raised."""
    if path.suffix == ".jsonl":
        # not splitlines(): JSON strings may hold U+2028, which ends a line for Python and not for JSON
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [(number, _json_or_error(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".json":
        rows = _json_or_error(path.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list):
            found = rows if isinstance(rows, ValueError) else f"it holds a {type(rows).__name__}"
            raise ValueError(f"{path} must hold a JSON list of objects: {found}")
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, restkey=TOO_MANY_FIELDS))
    else:
        rows = _load_dataset("parquet", data_files=str(path), split="train")
    return enumerate(rows, start=1)


def _json_or_error(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return error


def _load_dataset(name: str, config: str | None = None, **options: Any) -> Iterable[Any]:
    import datasets  # slow to import

    try:
        return datasets.load_dataset(name, config, **options)
    except Exception as error:
        source = ", ".join([name, *([config] if config else []), *map(str, options.values())])
        raise ValueError(
            f"could not load the dataset {source}: {error.__cause__ or error}\n"
            "Check the name, or give a file, or a folder with train.jsonl and test.jsonl."
        ) from error


def _checked(
    rows: list[tuple[int, Any]], prefix: str, source: str, prompt_column: str, solution_column: str | None
) -> list[Example]:
    if not rows:
        raise ValueError(f"{source} has no rows")
    columns = list(dict.fromkeys(key for _, row in rows if isinstance(row, dict) for key in row))
    needed = [prompt_column] if solution_column is None else [prompt_column, solution_column]
    if columns and (missing := [column for column in needed if column not in columns]):
        raise ValueError(
            f"{source} has no column {missing[0]!r}; its columns are {', '.join(columns)} "
            "(choose with prompt_column and solution_column)"
        )
    bad = [f"row {number}: {fault}" for number, row in rows if (fault := _fault(row, needed))]
    if bad:
        more = f"\n... and {len(bad) - MOST_BAD_ROWS_NAMED} more" if len(bad) > MOST_BAD_ROWS_NAMED else ""
        named = "\n".join(bad[:MOST_BAD_ROWS_NAMED])
        raise ValueError(f"{source} has bad rows ({len(bad)} of {len(rows)}):\n{named}{more}")
    absent = dict.fromkeys(columns)  # so that every reward gets every column, None where the row has none
    return [
        _example(f"{prefix}/{number - 1}", {**absent, **row}, prompt_column, solution_column) for number, row in rows
    ]


def _fault(row: Any, needed: list[str]) -> str | None:
    """What is wrong with a row, or None."""
    if isinstance(row, ValueError):
        return f"not JSON ({row})"
    if not isinstance(row, dict):
        return f"a {type(row).__name__} instead of an object"
    if TOO_MANY_FIELDS in row:
        return TOO_MANY_FIELDS
    for column in needed:
        value = row.get(column)
        if value is None:
            return f"{column!r} is missing"
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return f"{column!r} is a {type(value).__name__} instead of text"
        if not str(value).strip():
            return f"{column!r} is empty"
    return None


def _example(example_id: str, row: dict[str, Any], prompt_column: str, solution_column: str | None) -> Example:
    question, solution = str(row[prompt_column]), ""
    columns = {"question": question, **row, prompt_column: question}
    if solution_column is not None:
        solution = str(row[solution_column])
        columns = {"answer": solution, **columns, solution_column: solution}
    return Example(example_id, question, clean_solution(solution), columns)
