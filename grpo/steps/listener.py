"""The seam of the steps: who looks at what a step draws, and may have a say in it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.features import FEATURES
from grpo.config.run import TrainConfig
from grpo.learner.batch import TrainingBatch
from grpo.task.task import Task
from rewards.data.examples import Example
from rewards.group_score import GroupScore
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from grpo.steps.loop import Run


class Listener:
    """Looks at the steps of a run, on its first rank. A listener overrides what it needs.

    What is sampled ahead calls `begins`, `choose`, `sampled` and `metrics` in another thread and before its
    turn; the state that these have is taken back where the sampling fails.

    >>> class Longest(Listener):
    ...     def learns(self, step, drawn, batch):
    ...         return {"completion/length_max": max(len(c.token_ids) for g in drawn.groups for c in g.completions)}
    """

    def begins(self, step: int) -> None:
        """Is called before the prompts of a step are chosen."""

    def choose(self, count: int, step: int, draw: int) -> list[Example] | None:
        """The problems of a draw, all different; None: the next ones of the data. `draw` counts the refills of a
        step."""
        return None

    def sampled(self, step: int, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> None:
        """Is called after each draw of a step."""

    def metrics(self, step: int) -> dict[str, float]:
        """Gives the metrics of a step that was drawn."""
        return {}

    def learns(self, step: int, drawn: Drawn, batch: TrainingBatch) -> dict[str, float]:
        """Is called before the learner reads the batch of a step. Returns metrics."""
        return {}

    def taught(self) -> None:
        """Is called after a loss of a loop's own has taught a batch, whatever its advantages are."""

    def evaluated(self, step: int, results: Mapping[str, Any]) -> None:
        """Is called after an evaluation; `results` are by way of sampling."""

    def state_dict(self) -> dict[str, Any]:
        """Gives its state as JSON takes it, with names that no other listener has."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`state` has the names of all listeners."""


def listeners_of(run: Run[TrainConfig], task: Task) -> list[Listener]:
    """The listeners of the table of features that the run asks for."""
    modules = [importlib.import_module(f"grpo.steps.{feature.name}") for feature in FEATURES if feature.listener]
    listeners = [module.listener(run, task) for module in modules]
    return [listener for listener in listeners if listener is not None]
