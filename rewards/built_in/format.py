"""Format rewards: 1.0 if a completion has the wanted form, else 0.0. They do not depend on the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.built_in.gsm8k import extract_answer
from rewards.protocol import Completions, right_at, text_of


@right_at(None)
def regex_format(prompts: list | None, completions: Completions, pattern: str, **_) -> list[float]:
    """Gives 1.0 if `pattern` is found. Anchor it (`\\A`, `\\Z`) to match all; with `(?s)` a `.` matches newlines too.

    Python's `re` backtracks: a pattern such as `(a+)+b` may never end, and then the scorer's time limit kills it.

    >>> regex_format(None, ["The answer is 4.", "4"], pattern=r"answer is \\d+")
    [1.0, 0.0]
    """
    compiled = re.compile(pattern)
    return [float(compiled.search(text_of(completion)) is not None) for completion in completions]


@right_at(None)
def tag_format(
    prompts: list | None, completions: Completions, tags: Sequence[str] = ("think", "answer"), **_
) -> list[float]:
    """Gives 1.0 if the completion is `<tag>...</tag>` for each of `tags`, once, in their order, and nothing else.

    >>> tag_format(None, ["<think>6 * 7</think> <answer>42</answer>", "<answer>42</answer>"])
    [1.0, 0.0]
    """
    return [float(_is_tagged(text_of(completion), tags)) for completion in completions]


@right_at(None)
def gsm8k_format(prompts: list | None, completions: Completions, **_) -> list[float]:
    r"""Gives 1.0 if the completion has one `####` and ends with it and a number, like GSM8K's solutions.

    >>> gsm8k_format(None, ["6 * 7 = 42\n#### 42", "42", "#### 42 is the answer"])
    [1.0, 0.0, 0.0]
    """
    return [float(_is_gsm8k(text_of(completion))) for completion in completions]


def _is_tagged(text: str, tags: Sequence[str]) -> bool:
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(text.count(mark) != 1 for mark in marks):
        return False
    starts = [text.index(mark) for mark in marks]
    if starts != sorted(starts):
        return False
    ends = [start + len(mark) for start, mark in zip(starts, marks, strict=True)]
    # outside: before the first tag, between a closing and the next opening one, after the last
    outside = zip([0, *ends[1::2]], [*starts[0::2], len(text)], strict=True)
    return not any(text[start:end].strip() for start, end in outside)


def _is_gsm8k(text: str) -> bool:
    body, marker, last = text.rpartition("####")
    return (
        bool(marker)
        and "####" not in body
        and len(last.split()) == 1
        and "\n" not in last.rstrip()
        and last.rstrip()[-1:].isdigit()
        and extract_answer(text, "strict") is not None
    )
