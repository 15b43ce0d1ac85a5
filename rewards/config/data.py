"""Options of the data: which problems, how they become prompts, and in which order training sees them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from rewards.config.options import Lines, Options

ChatForm = dict[Literal["system", "user"], str]


class ProblemOptions(Options):
    """Which problems are read, and how; every command that takes data has these options."""

    name: str = "word_problems"
    """`word_problems`, `letter_sorting` or `word_game` (built in), `gsm8k`, `reasoning_gym:TASK`, a hub id, a folder
    with train.jsonl and test.jsonl, or one data file."""
    split: str = "train"
    """The split. Training refuses a test split, and an evaluation without `held_out` reads `eval.split`."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task that makes the problems: of `word_problems` its levels of difficulty, 1 to 4, {levels:
    [1, 2]}; of a reasoning_gym task its own, such as {max_animals: 4}."""
    prompt_column: str = "question"
    """The column that becomes the prompt: text, or chat messages (template: chat). `a.b` is `b` inside `a`."""
    solution_column: str | None = "answer"
    """The column with the gold solution, also `a.b`; rewards receive it under its own name. null: there is none."""


class TemplateOptions(Options):
    """What a chat template is told besides the messages."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the model's own chat template, such as {enable_thinking: false}, wherever it writes a prompt."""


class PromptOptions(TemplateOptions, ProblemOptions):
    """How problems become prompts; every command that prompts a policy has these options."""

    template: Annotated[str | ChatForm, Lines] = "{question}\n"
    """A format string over the data's columns, or `chat` for the model's own chat template, or what its messages say:
    {system: Be brief., user: "Question: {question}"}, either of them or both. The user's is a format string; worked
    examples are put where it has {examples}, each in the form of the text after it, and are turns of the chat
    otherwise."""
    few_shot: int = Field(default=0, ge=0)
    """How many worked examples, from the training split, come before every prompt."""


class SourceOptions(PromptOptions):
    """A source of data. A source takes nothing from another one: what it does not set has the default."""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first examples, at most this many; null uses all."""
    solutions: int | None = Field(default=None, ge=0)
    """Only the first so many training problems have a worked solution: supervised steps learn from these, and GRPO from
    the others, whose answers only the rewards read. null: both take all problems."""
    validation: int = Field(default=0, ge=0)
    """Keep so many training problems, the last ones, to choose by: an SFT stage then begins GRPO with its best point.
    They are never learned from, and no result is reported on them."""
    held_out: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of the examples for evaluation, where the data has no split for it. The content of a problem
    decides whether it is held out, so that rows appended later move no other row."""
    weight: float = Field(default=1.0, gt=0)
    """Of several sources: the share of the prompts is the weight over the sum of all weights."""
    label: str | None = Field(default=None, pattern=r"^[\w.:-]+$")
    """Of several sources: the name in metrics and messages; null takes the last part of `name`."""
    rewards: list[str] | None = Field(default=None, min_length=1)
    """Names of the rewards of the run that score the source's rows; the others abstain. null takes all of them."""


Source = TypeVar("Source", bound=SourceOptions)


def check_sources(sources: list[Source]) -> list[Source]:
    """Gives each of several sources a label, so that the configuration of a run reads the same again. Raises ValueError
    where two have the same, where they differ in what belongs to the run, and where there is no source."""
    if not sources:
        raise ValueError("data: there is no source; give one, as in data: {name: gsm8k}")
    if any(source.chat_template_kwargs != sources[0].chat_template_kwargs for source in sources):
        raise ValueError("data: chat_template_kwargs belongs to the whole run; give every source the same")
    if len(sources) == 1:
        return sources
    if unnamed := [i for i, source in enumerate(sources) if "name" not in source.model_fields_set]:
        raise ValueError(f"data[{unnamed[0]}].name is required: there are several sources")
    labels = [source.label or re.sub(r"[^\w.:-]+", "-", PurePath(source.name).name) for source in sources]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"data: two sources are called {label!r}; give one of them another label")
    return [source.model_copy(update={"label": label}) for source, label in zip(sources, labels, strict=True)]


def names_of(sources: Iterable[SourceOptions]) -> str:
    """The sources in a message.

    >>> names_of([SourceOptions(name="gsm8k"), SourceOptions(name="my.jsonl", label="mine")])
    'gsm8k + mine'
    """
    return " + ".join(source.label or source.name for source in sources)


def is_chat(template: str | Mapping[Any, str]) -> bool:
    """Whether a template is the model's own chat template, with what its messages say or without.

    >>> is_chat("chat"), is_chat({"system": "Be brief."}), is_chat("{question}")
    (True, True, False)
    """
    return template == "chat" or not isinstance(template, str)
