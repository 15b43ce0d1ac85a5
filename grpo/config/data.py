"""Options of the data: which problems, how they become prompts, and in which order training sees them."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from grpo.config.options import Lines, Options


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
    """`word_problems` or `word_game` (built in), `gsm8k`, `reasoning_gym:TASK`, a hub id, a folder with train.jsonl and
    test.jsonl, or one data file."""
    split: str = "train"
    """The split that is trained on; a test split is refused here."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first examples, at most this many; null uses all."""
    held_out: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of the examples for evaluation, where the data has no split for it. The content of a problem
    decides whether it is held out, so that rows appended later move no other row."""
    held_out_seed: int = 0
    """Another number holds out other problems. The run's `seed` has no influence on them, so that runs with different
    seeds can be compared."""


class WeightedSource(FormOptions, SourceOptions):
    """One of several sources of data."""

    name: str
    """Which dataset it is, as in `data.name`."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the prompts is its weight over the sum of all weights."""
    label: str | None = Field(default=None, pattern=r"^[\w.:-]+$")
    """Its name in metrics and messages; null takes the last part of `name`."""
    rewards: list[str] | None = Field(default=None, min_length=1)
    """Names of the rewards of the run that score its rows; the others abstain. null takes all of them."""


class DataOptions(PromptOptions, SourceOptions):
    """Where prompts come from."""

    sources: list[WeightedSource] = Field(default_factory=list)
    """Several sources in place of one. `data: [{name: gsm8k, weight: 2}, {name: my.jsonl, rewards: [mine]}]` says the
    same shortly, and `data: [gsm8k, my.jsonl]` has equal weights. What a source does not say is as `data` says, and
    `eval.limit` counts the held-out problems of each."""

    @field_validator("sources", mode="before")
    @classmethod
    def _read_names(cls, sources: Any) -> Any:
        if not isinstance(sources, list):
            return sources
        return [{"name": source} if isinstance(source, str) else source for source in sources]

    @model_validator(mode="after")
    def _complete_sources(self) -> DataOptions:
        """Fills each source up, so that the configuration of a run reads the same again; `name` lists the sources."""
        if not self.sources:
            return self
        names = (SourceOptions.model_fields.keys() | FormOptions.model_fields.keys()) - {"name"}
        for index, source in enumerate(self.sources):
            unsaid = {name: getattr(self, name) for name in names if name not in source.model_fields_set}
            label = source.label or re.sub(r"[^\w.:-]+", "-", PurePath(source.name).name)
            self.sources[index] = source.model_copy(update=unsaid | {"label": label})
        labels = [str(source.label) for source in self.sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"data.sources: two are called {label!r}; give one of them another label")
        listed = " + ".join(labels)
        if "name" in self.model_fields_set and self.name != listed:
            raise ValueError(
                f"data.name={self.name} with data.sources ({listed}): each source has its name; drop data.name"
            )
        if self.name != listed:
            self.name = listed
        return self
