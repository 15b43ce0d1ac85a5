"""Options of several sources of data, with weights."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from pydantic import Field, field_validator, model_validator

from rewards.config.data import DataOptions, FormOptions, SourceOptions


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


class SourcesOptions(DataOptions):
    """Where prompts come from."""

    sources: list[WeightedSource] = Field(default_factory=list)
    """Several sources in place of one. `data: [{name: gsm8k, weight: 2}, {name: my.jsonl, rewards: [mine]}]` says the
    same shortly, and `data: [gsm8k, my.jsonl]` has equal weights. What a source does not say is as `data` says, and
    `eval.limit` counts the held-out problems of each."""

    @model_validator(mode="before")
    @classmethod
    def _take_one(cls, options: Any) -> Any:
        """A caller in Python may give the options of one source as they are."""
        if isinstance(options, DataOptions) and not isinstance(options, cls):
            return {name: getattr(options, name) for name in options.model_fields_set}
        return options

    @field_validator("sources", mode="before")
    @classmethod
    def _read_names(cls, sources: Any) -> Any:
        if not isinstance(sources, list):
            return sources
        return [{"name": source} if isinstance(source, str) else source for source in sources]

    @model_validator(mode="after")
    def _complete_sources(self) -> SourcesOptions:
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
