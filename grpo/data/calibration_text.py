"""The text that a conversion is fitted to and judged by, as windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rewards.config.data import ProblemOptions
from rewards.data.examples import Example, load_examples
from rewards.data.leakage import refuse_evaluation_data
from rewards.data.source import FILE_KINDS

TEXT_KINDS = (".txt", ".md")
CHARACTERS_PER_TOKEN = 8  # more of a file is not read
WINDOW = 512  # tokens that are read at once


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids [T], all of one length: `held_out` are the last ones of the text and in no other list.
    `examples` are the problems that all of them come from, where the source has problems."""

    windows: list[Tensor]
    held_out: list[Tensor]
    examples: list[Example] = field(default_factory=list)


def calibration_text(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    held_out_tokens: int,
    window: int,
    left_out: Callable[[Example], bool] = lambda example: False,
) -> CalibrationText:
    """Gives at most `tokens` for measuring and training, and after them `held_out_tokens` that are held out.

    Problems that are `left_out` are not read. A shorter text is used completely, and a fifth of its windows are held
    out. Documents end with the tokenizer's eos; each window starts with bos where the tokenizer puts one before a text.
    Raises ValueError for a text of fewer than two windows or one that is named after a test set, and what
    `load_examples` raises.

    >>> calibration_text("gsm8k", tokenizer, tokens=4096, held_out_tokens=1024, window=512).held_out[0].shape
    torch.Size([512])
    """
    bos = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
    body, end = window - len(bos), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    most = -(-tokens // window) + -(-held_out_tokens // window)
    ids: list[int] = []
    examples: list[Example] = []
    for document, example in _documents(source, most * window * CHARACTERS_PER_TOKEN):
        if example and left_out(example):
            continue
        examples += [example] if example else []
        ids += tokenizer(document, add_special_tokens=False).input_ids + end
        if len(ids) >= most * body:
            break
    count = min(most, len(ids) // body)
    if count < 2:
        raise ValueError(
            f"calibrate={source!r} holds {len(ids)} tokens, and two windows of window={window} are the least, one to "
            "measure and one to hold out; give a longer text"
        )
    rows = [torch.tensor(bos + ids[i * body : (i + 1) * body]) for i in range(count)]
    held = max(1, min(-(-held_out_tokens // window), count // 5))
    return CalibrationText(rows[:-held], rows[-held:], examples)


def _documents(source: str, characters: int) -> Iterator[tuple[str, Example | None]]:
    path = Path(source).expanduser()
    if path.suffix in TEXT_KINDS or (path.is_file() and path.suffix not in FILE_KINDS):
        refuse_evaluation_data(source, "train", path)
        try:
            with path.open(encoding="utf-8") as file:
                yield file.read(characters), None
        except UnicodeDecodeError as error:
            raise ValueError(f"calibrate={source!r} is not text in UTF-8: {error}") from error
        return
    easiest = {"levels": [1]} if source == "word_problems" else {}
    for example in load_examples(source, "train", ProblemOptions(task_options=easiest)):
        yield f"{example.question}\n{example.solution}", example
