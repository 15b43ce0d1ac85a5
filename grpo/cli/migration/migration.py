"""What a script or a command of another trainer says, in options of ours; and what it says that has no counterpart."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.run import TrainConfig
from rewards.config.names import hint, ours, put, rows_of, trainers
from rewards.config.options import _defaults
from rewards.config.yaml_file import to_yaml


@dataclass(frozen=True)
class Unsupported:
    """An option of the other trainer that is set to another value than its default and is not carried over."""

    option: str
    """Its name there, such as `top_p`, or an argument of the trainer, such as `callbacks`."""
    value: object
    reason: str
    """Why it is not carried over, and the way out."""
    changes_training: bool = True
    """Whether a run here learns something else for it. Logging, uploads and loading of data change nothing."""


@dataclass(frozen=True)
class Migration:
    """The options of `quartet train` that do what a script or a command of another trainer does."""

    source: str
    """What was read: `script.py`, or `verl.trainer.main_ppo`."""
    options: dict[str, Any] = field(default_factory=dict)
    """A tree of options, without `rewards`; the defaults of the other trainer are among them."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Reward functions as the option `rewards` takes them, such as `{"function": "script.py:grade", "weight": 1.0}`."""
    unsupported: list[Unsupported] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences about what was decided on the way: how a batch was counted, which files were written."""

    @property
    def tree(self) -> dict[str, Any]:
        """Gives all options, the rewards among them: `TrainConfig(**migration.tree)` is the configuration."""
        tree = self.options | {"rewards": self.rewards}
        return {name: tree[name] for name in TrainConfig.model_fields if name in tree}

    def put(self, key: str, value: object) -> None:
        put(self.options, key, value)

    def carry_over(self, kind: str, values: Mapping[str, Any]) -> None:
        """Sets the options whose values go over as they are, or by their table `values`."""
        for name, row in trainers()[kind].items():
            if "same" not in row or name not in values:
                continue  # another version has no such option
            value, choices, [key, *_] = values[name], row.get("values"), ours(row)
            if choices is None or (isinstance(value, Hashable) and value in choices):
                self.put(key, choices[value] if choices else value)
            else:
                known = ", ".join(dict.fromkeys(map(str, choices.values())))
                self.unsupported.append(Unsupported(name, value, f"{key} is one of {known}; set the nearest by hand"))

    def lacks(self, option: str, value: object, **facts: object) -> None:
        """Notes that an option is not carried over; `facts` are for the reason in its row."""
        rows = (table.get(option, {}) for table in trainers().values())
        reason = next((row["reason"] for row in rows if "reason" in row), "").format(**facts) or reason_of(option)
        value = "..." if option.endswith("token") else value  # a secret such as hub_token
        self.unsupported.append(Unsupported(option, value, reason, changes_training(option)))

    def lacks_counterparts(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], known: Collection[str]
    ) -> None:
        """Notes what is set to another value than its default and is in no table."""
        for name, value in values.items():
            both_off = all(not each or each == "no" for each in (value, defaults.get(name)))  # None, False, {}, ...
            if name not in known and not both_off and not (name in defaults and value == defaults[name]):
                self.lacks(name, value)

    def sample_with_vllm(self, option: str, value: object, engine: Mapping[str, Any]) -> None:
        from rollout.vllm.process import interpreter  # it loads torch

        if interpreter().is_file():
            self.put("rollout.backend", "vllm")
            self.put("rollout.vllm.engine", dict(engine))
        else:
            self.lacks(option, value, engine=f"rollout.vllm.engine: {to_yaml(engine, inline=True)}")

    def yaml(self) -> str:
        """The options as a file for `quartet train`, after comments about what has no counterpart."""
        return "".join(f"# {line}\n" for line in self.lines()) + to_yaml(self.tree)

    def lines(self) -> list[str]:
        """What is not carried over, and what was decided, for a person."""
        title = f"From {self.source}. Not carried over, so that something else is learned:"
        lines = [title, *self.losses(True)] if self.losses(True) else [f"From {self.source}."]
        if without_effect := self.losses(False):
            lines += ["Not carried over, with no effect on what is learned:", *without_effect]
        return [*lines, *(" ".join(note.split()) for note in self.notes)]

    def losses(self, changes_training: bool) -> list[str]:
        """Each option that is not carried over, in a line."""
        losses = [each for each in self.unsupported if each.changes_training is changes_training]
        return [f"- {each.option}={to_yaml(each.value, inline=True)[:60]}: {each.reason}" for each in losses]


def carried(kind: str) -> list[str]:
    """The names of another trainer whose values a migration carries over."""
    return [name for name, row in trainers()[kind].items() if "same" in row or "to" in row]


def changes_training(option: str) -> bool:
    """Whether something else is learned with another value of an option of theirs."""
    return not any(row.get("effect") == "none" for row in rows_of(option))


def our_defaults() -> dict[str, Any]:
    """The defaults of `quartet train` by the whole keys of the options."""
    return _defaults(TrainConfig)


def reason_of(name: str) -> str:
    """Why an option of another trainer has no counterpart, or where something like it is.

    >>> reason_of("hub_strategy")
    'training uploads nothing; `quartet export RUN --push_to_hub OWNER/NAME` uploads the policy of a run'
    """
    answer = hint(name, our_defaults()) or ""
    if answer.startswith("did you mean "):
        option, _, note = answer.removeprefix("did you mean ").partition("?")
        return f"{option} is the nearest{note}; set it by hand"
    return answer.removeprefix("not supported, because ") or "no option here has this meaning"


def relative(path: Path) -> str:
    """The path as an option holds it: from the working folder where it is below that."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
