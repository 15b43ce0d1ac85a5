"""From the rows of a dataset to examples, and what is checked before a run may start."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from rewards.config.data import ProblemOptions
from rewards.config.json_file import unfit, with_inner
from rewards.data.leakage import is_gsm8k_test_question, refuse_evaluation_data
from rewards.data.source import (
    BUILT_IN,
    GSM8K,
    MADE,
    REASONING_GYM,
    TOO_MANY_FIELDS,
    file_rows,
    load_dataset,
    local_file,
)
from rewards.protocol import text_of

GSM8K_COPY = "data/gsm8k"  # train.jsonl and test.jsonl here, or in the folder that QUARTET_GSM8K names, spare the hub
MOST_BAD_ROWS_NAMED = 10
CHARACTERS_PER_TOKEN = 64  # no text comes near this as a mean; longer ones are refused before a tokenizer reads them
GSM8K_TEST = "a question of GSM8K's test set, which must not be trained on"

Check = Callable[[Mapping[str, Any]], str | None]

_CALCULATOR_MARK = re.compile(r"<<[-+*/().=\d]*>>")


@dataclass(frozen=True)
class Example:
    """One problem. `solution` is ready to train on (`clean_solution`), and empty if the data has none; `columns` go to
    the rewards.

    `messages` are the prompt where the data has it as a chat (TRL's conversational form); `question` is then what its
    last message says.

    >>> Example("gsm8k/train/0", "2 + 3 = ?", "2 + 3 = 5\\n#### 5",
    ...         {"question": "2 + 3 = ?", "answer": "2 + 3 = <<2+3=5>>5\\n#### 5"}).example_id
    'gsm8k/train/0'
    """

    example_id: str
    question: str
    solution: str
    columns: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None


def beyond_context(text: str, context: int) -> str | None:
    """Says why `text` cannot fit into a context of `context` tokens, by its length; None if a tokenizer must decide.

    >>> beyond_context("2 + 3 = ?" * 10_000, context=512)
    'has 90,000 characters, more than a context of 512 tokens can hold'
    """
    if len(text) <= CHARACTERS_PER_TOKEN * context:
        return None
    return f"has {len(text):,} characters, more than a context of {context:,} tokens can hold"


def clean_solution(text: str) -> str:
    """Strip GSM8K's calculator marks.

    >>> clean_solution("Natalia sold 48/2 = <<48/2=24>>24 clips in May.")
    'Natalia sold 48/2 = 24 clips in May.'
    """
    return _CALCULATOR_MARK.sub("", text)


def load_examples(
    name_or_path: str | Path,
    split: str,
    options: ProblemOptions | None = None,
    *,
    purpose: Literal["train", "eval"] = "train",
    limit: int | None = None,
    seed: int = 0,
    checks: Sequence[Check] = (),
) -> list[Example]:
    """The first `limit` examples of a dataset, every row checked.

    `name_or_path` is one of

    - `word_problems`, with levels in `options.task_options` and `seed`; 20,000 problems unless `limit` says otherwise,
    - `letter_sorting`, with `seed`; 20,000 problems unless `limit` says otherwise,
    - `word_game`, with `seed`, for the environment of that name; 5,000 games unless `limit` says otherwise,
    - `reasoning_gym:TASK`, with `options.task_options` and `seed`; 2,000 problems unless `limit` says otherwise,
    - `gsm8k` (from the folder that QUARTET_GSM8K names, or data/gsm8k where it exists, else from the hub), or any hub
      id, with its configuration after a colon (`owner/name:config`),
    - a folder that holds `{split}.jsonl` (or .json, .parquet, .csv), or such a file, whatever `split` is.

    The prompt column holds text, or chat messages of which the last one is the user's. All columns of a row go to the
    rewards; where the row has no columns `question` and `answer`, these names hold the question and the solution.
    `checks` say what else is wrong with the columns of an example, or None.

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
    options = options or ProblemOptions()
    if options.task_options and source != "word_problems" and not source.startswith(REASONING_GYM):
        raise ValueError(
            f"data.task_options={options.task_options} are for word_problems and reasoning_gym tasks; {name_or_path} "
            "has none"
        )
    if purpose == "train":
        refuse_evaluation_data(str(name_or_path), split, None)
    problems = _made(source, split, seed, limit, options.task_options)
    if problems:
        solution_column: str | None = "answer"
        if problems[0]["answer"] is None:
            solution_column = None
            if options.solution_column is not None:
                raise ValueError(
                    f"{source} has no reference answers, only a scorer: set data.solution_column to null "
                    f"(data.solution_column={options.solution_column})"
                )
        return [_example(row["id"], row, "question", solution_column) for row in problems]
    if source == GSM8K:
        source = _gsm8k()
    path = None if source in BUILT_IN.values() else local_file(source, split)
    if purpose == "train":
        refuse_evaluation_data(str(name_or_path), split, path)
    if path:
        prefix = f"{path.resolve().parent.name}/{path.stem}"
        numbered = file_rows(path)
    else:
        name, _, config = source.partition(":")
        prefix = f"{name.split('/')[-1]}/{split}"
        numbered = enumerate(load_dataset(name, config or None, split=split), start=1)
    if purpose == "train":
        checks = [_of_the_test, *checks]
    needed = [column for column in (options.prompt_column, options.solution_column) if column]
    try:
        rows = [(number, with_inner(row, needed)) for number, row in islice(numbered, limit)]
    except Exception as error:  # whatever a library raises for a damaged file
        raise ValueError(f"{path or source} cannot be read: {type(error).__name__}: {error}") from error
    return _checked(rows, prefix, str(path or source), needed, checks)


def _made(
    source: str,
    split: str,
    seed: int,
    limit: int | None,
    task_options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The problems of a source that makes them itself; none of any other source."""
    if source.startswith(REASONING_GYM):
        from rewards.data.reasoning_gym import COUNT, reasoning_gym_problems

        task = source.removeprefix(REASONING_GYM)
        return reasoning_gym_problems(task, split, seed, count=limit or COUNT, options=task_options)
    if source == "word_problems":
        from rewards.data.word_problems import word_problems

        return word_problems(split, _levels(task_options), seed, count=limit or 20_000)
    if source == "letter_sorting":
        from rewards.data.letter_sorting import COUNT, letter_sorting

        return letter_sorting(split, seed, count=limit or COUNT)
    if source == "word_game":
        from rewards.data.word_game import COUNT, word_games

        return word_games(split, seed, count=limit or COUNT)
    return []


def _gsm8k() -> str:
    """The folder of a copy, or the hub's id. Raises FileNotFoundError where QUARTET_GSM8K names no folder."""
    folder = os.environ.get("QUARTET_GSM8K")
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(
            f"QUARTET_GSM8K={folder} is no folder; name the one with GSM8K's train.jsonl and test.jsonl, or unset it"
        )
    return folder or (GSM8K_COPY if Path(GSM8K_COPY).is_dir() else GSM8K)


def _levels(task_options: Mapping[str, Any]) -> Sequence[int]:
    others = set(task_options) - {"levels"}
    levels = task_options.get("levels", [1, 2])
    if others or not isinstance(levels, list):
        raise ValueError(
            f"data.task_options={dict(task_options)}: word_problems has a list of levels and nothing else, such as "
            "{levels: [1, 2]}"
        )
    return levels


def gold_checks(functions: Iterable[str]) -> list[Check]:
    """A check for gold answers that the gsm8k rewards among the `functions` of a run cannot read, if it has one.

    >>> [check] = gold_checks(["gsm8k"])
    >>> check({"answer": "It is four."})
    "the gold answer 'It is four.' has no number: expected a solution that ends with '#### 42', or '42'"
    """
    readers = ("gsm8k", "gsm8k_flexible", "gsm8k_boxed", "gsm8k_lm_eval")
    if not any(function in readers for function in functions):
        return []
    from rewards.built_in.gsm8k import gold_answer

    def check(columns: Mapping[str, Any]) -> str | None:
        try:
            if "answer" in columns:  # the scorer refuses a column that is not there
                gold_answer(columns["answer"])
        except ValueError as error:
            return str(error)
        return None

    return [check]


def default_held_out_split(name: str) -> str:
    """The split for evaluation where the user names none.

    >>> default_held_out_split("gsm8k"), default_held_out_split("reasoning_gym:leg_counting")
    ('test', 'held_out')
    """
    return "held_out" if name in MADE or name.startswith(REASONING_GYM) else "test"


def _checked(
    rows: list[tuple[int, Any]],
    prefix: str,
    source: str,
    needed: list[str],
    checks: Sequence[Check],
) -> list[Example]:
    """`needed` are the columns of the prompt and of the solution, if the data has one."""
    if not rows:
        raise ValueError(f"{source} has no rows")
    columns = list(dict.fromkeys(chain.from_iterable(row for _, row in rows if isinstance(row, dict))))
    if columns and (missing := [column for column in needed if column not in columns]):
        raise ValueError(
            f"{source} has no column {missing[0]!r}; its columns are {', '.join(columns)} "
            "(choose with prompt_column and solution_column)"
        )
    absent = dict.fromkeys(columns)  # so that every reward gets every column, None where the row has none
    examples, bad = [], []
    for number, row in rows:
        fault = _fault(row, needed)
        if not fault:
            examples.append(_example(f"{prefix}/{number - 1}", {**absent, **row}, *needed))
            fault = next(filter(None, (check(examples[-1].columns) for check in checks)), None)
        if fault:
            bad.append(f"row {number}: {fault}")
    if bad:
        more = f"\n... and {len(bad) - MOST_BAD_ROWS_NAMED} more" if len(bad) > MOST_BAD_ROWS_NAMED else ""
        named = "\n".join(bad[:MOST_BAD_ROWS_NAMED])
        raise ValueError(f"{source} has bad rows ({len(bad)} of {len(rows)}):\n{named}{more}")
    return examples


def _fault(row: object, needed: list[str]) -> str | None:
    """Tells what is wrong with a row, or None."""
    if isinstance(row, ValueError):
        return f"not JSON ({row})"
    if not isinstance(row, dict):
        return f"a {type(row).__name__} instead of an object"
    if TOO_MANY_FIELDS in row:
        return TOO_MANY_FIELDS
    for column in needed:
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
            if fault := _fault_of_chat(value, "user" if column == needed[0] else "assistant"):
                return f"{column!r} {fault}"
            value = text_of(value[-1:])
        if value is None:
            return f"{column!r} is missing"
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return f"{column!r} is a {type(value).__name__} instead of text"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{column!r} is {value} instead of text"
        if not str(value).strip():
            return f"{column!r} is empty"
    return next((f"{column!r} {fault}" for column in row if (fault := unfit(column) or unfit(row[column]))), None)


def _of_the_test(columns: Mapping[str, Any]) -> str | None:
    return GSM8K_TEST if is_gsm8k_test_question(_texts(columns.values())) else None


def too_long(column: str, context: int, columns: Mapping[str, Any]) -> str | None:
    """A check of one column against the number of tokens that fit."""
    value = columns[column]
    text = value if isinstance(value, str) else "".join(message["content"] for message in value)
    fault = beyond_context(text, context)
    return f"{column!r} {fault}" if fault else None


def _fault_of_chat(messages: list[dict[str, Any]], last: str) -> str | None:
    """Tells what is wrong with chat messages in TRL's conversational form, or None."""
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return f'has a message that is not {{"role": text, "content": text}}: {str(message)[:60]}'
    if messages[-1]["role"] != last:
        return f"is a chat that does not end with a message of the {last}"
    return None


def _texts(values: Iterable[Any]) -> Iterable[Any]:
    """The values, and what the messages of chats among them say."""
    for value in values:
        yield value
        if isinstance(value, list):
            yield from (message.get("content") for message in value if isinstance(message, dict))


def _example(example_id: str, row: dict[str, Any], prompt_column: str, solution_column: str | None = None) -> Example:
    asked = row[prompt_column]
    messages = asked if isinstance(asked, list) else None
    question = text_of(messages[-1:]) if messages else str(asked)
    columns = {"question": question, **row, prompt_column: messages or question}
    if solution_column is None:
        return Example(example_id, question, "", columns, messages)
    solution = row[solution_column]
    solution = text_of(solution[-1:]) if isinstance(solution, list) else str(solution)
    columns = {"answer": solution, **columns, solution_column: solution}
    return Example(example_id, question, clean_solution(solution), columns, messages)
