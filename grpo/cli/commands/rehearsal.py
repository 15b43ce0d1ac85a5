"""What a rehearsal has found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from grpo.cli.migration.migration import Migration, our_defaults
from grpo.config.run import TrainConfig
from rewards.config.options import load
from rewards.finding import Report


@dataclass(kw_only=True)
class Rehearsal(Report):
    """What `rehearse` found: `facts` by parts of the run, metrics of the `steps`, the fate of `disturbed` runs."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    disturbed: dict[str, str] = field(default_factory=dict)

    def refuse(self, error: Exception | str) -> None:
        """Adds what a run says when it refuses something, each thing as a finding."""
        for line in str(error).split("\n  "):
            if not line.endswith("things are wrong with this run:"):
                self.add("refused", line, key_of(line))

    def read_from(self, migration: Migration) -> None:
        """Adds what a script or a command of another trainer says that has no counterpart, or is refused there."""
        for line in (*migration.losses(True), *migration.losses(False)):
            self.add("not-converted", line.removeprefix("- "))
        for note in migration.notes:
            if note.startswith("TRL itself refuses"):
                self.add("refused", note)
        self.facts["read"] = {migration.source: " ".join(migration.notes)}


def with_options(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values of these options, by their keys. Raises ConfigError."""
    return load(TrainConfig, None, {**config.model_dump(round_trip=True), **changes})


@cache
def key_of(message: str) -> str:
    """The option that a message is about: one that it gives a value to, else one that it names; "" for none.

    >>> key_of("prompts_per_step=8, but there are 5 training examples; lower it")
    'prompts_per_step'
    """
    if message.startswith("reward '"):
        return "rewards"
    keys = list(our_defaults())
    for word in re.findall(r"([a-z_]+(?:\.[a-z_]+)*)(?:\[\d+\][\w.]*)?=", message):
        if word in keys:
            return str(word)
    for word in re.findall(r"[a-z]+(?:[._][a-z]+)+", message):
        ending = [key for key in keys if key == word or key.endswith(f".{word}")]
        if len(ending) == 1:
            return ending[0]
    return "rewards" if "reward" in message else ""
