"""What a rehearsal has found, and how it is printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from rich.console import Console

from grpo.cli.migration.migration import Migration, our_defaults
from grpo.config.run import TrainConfig
from rewards.config.options import load

Effect = Literal["ends", "spoils", "warns"]  # what a finding does to the real run; what only warns may be meant so


@dataclass(frozen=True)
class Finding:
    """What is wrong: the option's key, the fact with its number, and the way out. `effect` is that on the real run."""

    effect: Effect
    key: str
    what: str
    advice: str = ""


@dataclass
class Rehearsal:
    """What `rehearse` found, by parts of the run: `facts`, the metrics of the `steps`, and what became of `faults`."""

    model: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Tells whether something would end or spoil the real run."""
        return any(finding.effect != "warns" for finding in self.findings)

    def add(self, effect: Effect, key: str, what: str, advice: str = "") -> None:
        finding = Finding(effect, key, " ".join(what.split()), advice)
        if finding not in self.findings:
            self.findings.append(finding)

    def refuse(self, error: Exception | str) -> None:
        """Adds what a run says when it refuses something, each thing as a finding."""
        for line in str(error).split("\n  "):
            if not line.endswith("things are wrong with this run:"):
                self.add("ends", key_of(line), line)

    def read_from(self, migration: Migration) -> None:
        """Adds what a script or a command of another trainer says that has no counterpart, or is refused there."""
        for line in (*migration.losses(True), *migration.losses(False)):
            self.add("warns", "", line.removeprefix("- "))
        for note in migration.notes:
            if note.startswith("TRL itself refuses"):
                self.add("ends", "", note)
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


def show(result: Rehearsal, console: Console) -> None:
    """Prints the facts by parts of the run, what became of the faults, and the findings, the worst ones last."""
    lines = []
    for part, facts in result.facts.items():
        words = (
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
        lines.append(f"{part}: {', '.join(words)}")
    lines += [f"fault, {name}: {words}" for name, words in result.faults.items()]
    for effect in ("warns", "spoils", "ends"):
        for finding in (finding for finding in result.findings if finding.effect == effect):
            advice = f"; {finding.advice}" if finding.advice else ""
            lines.append(f"{effect:6}  {finding.key or 'run'}: {finding.what}{advice}")
    lines.append("something would end or spoil the run" if result.wrong else "nothing would end or spoil the run")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
