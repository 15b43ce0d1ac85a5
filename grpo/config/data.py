"""Options of the data, and of the order in which training meets it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from grpo.config.options import Options


class ProblemOptions(Options):
    """How the rows of a dataset are read as problems; every command that takes data has these options."""

    levels: list[int] = Field(default_factory=lambda: [1, 2], min_length=1)
    """Difficulty levels of `word_problems`, 1 to 4."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of a reasoning_gym task, such as {max_animals: 4}."""
    prompt_column: str = "question"
    """The column that becomes the prompt: text, or chat messages (template: chat)."""
    solution_column: str = "answer"
    """The column with the gold solution; rewards receive it under its own name."""


class PromptOptions(ProblemOptions):
    """How problems become prompts; every command that prompts a policy has these options."""

    template: str = "{question}\n"
    """A format string over the data's columns, or `chat` for the model's own chat template."""
    system_prompt: str | None = None
    """System message in front of every chat prompt (template: chat)."""
    user_turn: str | None = None
    """template: chat: a format string for the user's message, such as "Be brief.\\n\\n{examples}Question: {question}".
    The worked examples go where {examples} is, each in the form of what follows it; without it they are turns."""
    few_shot: int = Field(default=0, ge=0)
    """Worked examples from the training split in front of every prompt."""


class SourceOptions(Options):
    """Which dataset a run trains on, and which of its rows."""

    name: str = "word_problems"
    """`word_problems` (built in), `gsm8k`, `reasoning_gym:TASK`, a hub id, a folder with train.jsonl and test.jsonl, or
    one data file."""
    split: str = "train"
    """The split that is trained on; a test split is refused here."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many examples only."""
    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of the examples for evaluation instead of a split of its own. Each problem's content decides,
    so that appended rows move no other row."""
    holdout_seed: int = 0
    """Another number holds out other problems. The run's `seed` does not, so that all seeds can be compared."""


class DataOptions(PromptOptions, SourceOptions):
    """Where prompts come from."""


class CurriculumOptions(Options):
    """What GRPO meets first: short prompts, learnable prompts, short completions, shallow drafts. Off by default."""

    steps: int = Field(default=100, ge=1)
    """Everything below has grown to the whole by this step, in a straight line."""
    shortest_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training examples open at step 1, shortest gold solutions first; of the open ones the least seen."""
    by_difficulty: bool = False
    """Draw prompts ∝ p(1−p), p being the running share of a prompt's completions with full marks (1, what a gold
    solution gets where that is more, or what the reward declares); unseen: the mean."""
    completion_tokens: int | None = Field(default=None, ge=1)
    """Length limit of completions at step 1, growing to rollout.max_completion_tokens; null is that from the start."""
    draft_depth: int | None = Field(default=None, ge=1)
    """Depth of the draft head at step 1, growing to mtp.depth; null is that from the start."""
