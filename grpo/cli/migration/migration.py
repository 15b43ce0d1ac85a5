"""What a script or a command of another trainer says, in options of ours; and what it says that has no counterpart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """An option of the other trainer that is set to another value than its default and is not carried over."""

    option: str
    """Its name there, such as `top_p`, or an argument of the trainer, such as `callbacks`."""
    value: Any
    reason: str
    """Why it is not carried over, and the way out."""
    changes_training: bool = True
    """Whether a run here learns something else for it. Logging, uploads and loading of data change nothing."""


@dataclass(frozen=True)
class Migration:
    """The options of `quartet train` that do what a script or a command of another trainer does."""

    source: str
    """What was read: `script.py`, or `verl.trainer.main_ppo`."""
    options: dict[str, Any]
    """A tree of options, without `rewards`; defaults of the other trainer that differ from ours are among them."""
    rewards: list[dict[str, Any]]
    """Reward functions as the option `rewards` takes them, such as `{"function": "script.py:grade", "weight": 1.0}`."""
    unsupported: list[Unsupported]
    notes: list[str] = field(default_factory=list)
    """Sentences about what was decided on the way: how a batch was counted, which files were written."""

    @property
    def tree(self) -> dict[str, Any]:
        """Gives all options, the rewards among them: `TrainConfig(**migration.tree)` is the configuration."""
        return self.options | {"rewards": self.rewards}
