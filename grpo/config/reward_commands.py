"""Options of `quartet reward test` and `quartet reward replay`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from grpo.config.options import Options


class RewardTestConfig(Options):
    """Try a reward function on data, without a model: gold solutions get full marks, empty and wrong ones do not."""

    data: str = "word_problems"
    """`word_problems`, `gsm8k`, `reasoning_gym:TASK`, a hub id, a folder with train.jsonl, or one data file."""
    split: str = "train"
    """The split."""
    levels: list[int] = Field(default_factory=lambda: [1, 2], min_length=1)
    """Difficulty levels of `word_problems`, 1 to 4."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of a reasoning_gym task, such as {max_animals: 4}."""
    limit: int | None = Field(default=200, ge=1)
    """Use the first so many rows only; null uses them all."""
    prompt_column: str = "question"
    """The column that becomes the prompt."""
    solution_column: str = "answer"
    """The column with the gold solution."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function, such as `--arguments.target 30`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of the data for parameters of another name, such as {reference: answer}."""
    chat: bool = False
    """Hand prompts and completions to it as chat messages instead of strings."""
    full_marks: float | None = None
    """What a right completion scores; by default what the function declares (`rewards.right_at`), else 1, or what the
    first gold solution gets where that is more."""
    shaping: bool = False
    """The function does not judge the answer (a format, a length): any completion may get full marks, or miss them."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Wall-clock seconds that the function may take per batch of at most 256 completions."""
    pass_variables: list[str] = Field(default_factory=list)
    """Environment variables that the function may read besides the usual few, such as [OPENAI_API_KEY]."""


class ReplayConfig(Options):
    """Score the recorded completions of a run again, with another function, and show what changes."""

    against: str | None = None
    """The recorded value to compare with: a reward's name, or `score` for the weighted sum; the namesake by default."""
    steps: list[int] | None = None
    """Steps to score, such as `[1, 50]`; null scores all that are recorded."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of the data for parameters of another name, such as {reference: answer}."""
    chat: bool = False
    """Hand prompts and completions to it as chat messages instead of strings."""
    on_error: str = Field(default="abort", pattern=r"^(abort|drop_sample)$")
    """`abort` ends at the first failure; `drop_sample` counts failures and goes on."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Wall-clock seconds that the function may take per batch of at most 256 completions."""
    workers: int = Field(default=1, ge=1)
    """Processes that score."""
    pass_variables: list[str] = Field(default_factory=list)
    """Environment variables that the function may read besides the usual few, such as [OPENAI_API_KEY]."""
