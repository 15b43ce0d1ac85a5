"""Options of the data: which problems, how they become prompts, and in which order training sees them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rewards.config.options import Lines, Options


class ProblemOptions(Options):
    """How the rows of a dataset are read as problems; every command that takes data has these options."""

    levels: list[int] = Field(default_factory=lambda: [1, 2], min_length=1)
    """Difficulty levels of `word_problems`, 1 to 4."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of a reasoning_gym task, such as {max_animals: 4}."""
    prompt_column: str = "question"
    """The column that becomes the prompt: text, or chat messages (template: chat). `a.b` is `b` inside `a`."""
    solution_column: str = "answer"
    """The column with the gold solution, also `a.b`; rewards receive it under its own name."""


class TemplateOptions(Options):
    """What a chat template is told besides the messages."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the model's own chat template, such as {enable_thinking: false}, wherever it writes a prompt."""


class FormOptions(ProblemOptions):
    """How the problems of one source become prompts."""

    template: Annotated[str, Lines] = "{question}\n"
    """A format string over the data's columns, or `chat` for the model's own chat template."""
    system_prompt: Annotated[str | None, Lines] = None
    """System message before every chat prompt (template: chat)."""
    user_turn: Annotated[str | None, Lines] = None
    """template: chat: a format string for the user's message, such as "Be brief.\\n\\n{examples}Question: {question}".
    Worked examples are put where {examples} is, each in the form of the text after it; without {examples} they are
    turns of the chat."""
    few_shot: int = Field(default=0, ge=0)
    """How many worked examples, from the training split, come before every prompt."""


class PromptOptions(TemplateOptions, FormOptions):
    """How problems become prompts; every command that prompts a policy has these options."""


class SourceOptions(Options):
    """Which dataset a run trains on, and which of its rows."""

    name: str = "word_problems"
    """`word_problems`, `letter_sorting` or `word_game` (built in), `gsm8k`, `reasoning_gym:TASK`, a hub id, a folder
    with train.jsonl and test.jsonl, or one data file."""
    split: str = "train"
    """The split that is trained on; a test split is refused here."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first examples, at most this many; null uses all."""
    solutions: int | None = Field(default=None, ge=0)
    """Only the first so many training problems have a worked solution: supervised steps learn from these, and GRPO from
    the others, whose answers only the rewards read. null: both take all problems."""
    validation: int = Field(default=0, ge=0)
    """Keep so many training problems, the last ones, to choose by: a warm start then begins GRPO with its best point.
    They are never learned from, and no result is reported on them."""
    held_out: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of the examples for evaluation, where the data has no split for it. The content of a problem
    decides whether it is held out, so that rows appended later move no other row."""
    held_out_seed: int = 0
    """Another number holds out other problems. The run's `seed` has no influence on them, so that runs with different
    seeds can be compared."""


class DataOptions(PromptOptions, SourceOptions):
    """Where prompts come from."""
