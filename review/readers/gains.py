"""What a run gained in training and on held-out problems, by its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from review.readers.run_folder import read_problems
from review.statistics.gain import MEAN, Gain, held_out_gain, training_gain
from rewards.config.names import recorded_options
from rewards.config.yaml_file import flat
from rewards.verdicts import ACCURACY, held_out_metric

LEAST_GAIN = 0.01  # in training, before it is looked for on held-out problems
POWER = 1.96 + 0.84  # standard errors: 80 % power at 95 % confidence


def label_of(reward: Mapping[str, Any]) -> str:
    """The name under which the marks of a reward are recorded: `RewardSpec.label`."""
    return str(reward.get("name") or PurePath(str(reward.get("function", "")).rpartition(":")[2]).name)


def options_of_run(folder: Path) -> tuple[str, dict[str, Any]]:
    """The command of a run and its options by dotted key."""
    file = folder / "config.yaml"
    command, options = recorded_options(file) if file.is_file() else ("train", {})
    return command, flat(options)


@dataclass(frozen=True)
class Gains:
    """A run's options by dotted key, and what its training reward and its held-out problems gained."""

    options: Mapping[str, Any]
    training: Gain | None
    held_out: Gain | None

    @classmethod
    def of(cls, folder: Path, options: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Gains:
        """`rows` are the metrics of the run in `folder`."""
        rewards = options.get("rewards") or [{}]
        metric = held_out_metric(rows)
        by_problem = read_problems(folder, metric)
        names = [f"reward/part/{label_of(rewards[0])}", MEAN]  # accuracy is by the first reward, and the mean of all
        training = training_gain(rows, names if metric == ACCURACY else names[::-1])
        return cls(options, training, held_out_gain(rows, by_problem))

    @property
    def words(self) -> str:
        """Both gains in a sentence, or the one that is known."""
        training = f"Training reward went {self.training.words}" if self.training else ""
        if self.held_out is None:
            return f"{training}."
        name = "held-out accuracy" if self.held_out.metric == ACCURACY else "the held-out reward"
        held_out = f"{name} {self.held_out.words}"
        if self.training is None:
            return f"{name.capitalize()} went {self.held_out.words}."
        return f"{training}, and {held_out}."

    @property
    def are_apart(self) -> bool:
        """Whether the training reward rose by more than chance, and the held-out problems did not."""
        if self.training is None or self.held_out is None:
            return False
        return self.training.low > 0 and self.training.value > LEAST_GAIN and self.held_out.low <= 0

    @property
    def problems_needed(self) -> int:
        """How many held-out problems would show a gain as large as that in training.

        Without pairs: POWER² · (p₁q₁ + p₂q₂) / gain². With pairs the standard error shrinks by √problems.
        """
        assert self.training is not None
        assert self.held_out is not None
        gain, p = max(self.training.value, LEAST_GAIN), self.held_out.first
        if self.held_out.is_paired:
            error = (self.held_out.high - self.held_out.low) / 2 / 1.96
            return math.ceil(self.held_out.count * (POWER * error / gain) ** 2)
        goal = min(p + gain, 1.0)
        return math.ceil(POWER**2 * (p * (1 - p) + goal * (1 - goal)) / gain**2)

    @property
    def are_too_few(self) -> bool:
        """Whether the held-out problems leave open a gain as large as that in training."""
        assert self.training is not None
        assert self.held_out is not None
        return self.held_out.count < self.problems_needed and self.held_out.high >= self.training.value

    def option(self, key: str) -> str:
        """The option as a sentence names it."""
        return f"{key} (now {self.options[key]})" if key in self.options else key
