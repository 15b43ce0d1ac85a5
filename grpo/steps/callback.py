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


class Callback:
    """Looks at the steps of a run, on its first rank. A callback overrides what it needs.

    Asynchronous rollouts call `on_step_begin`, `choose_prompts`, `on_groups_sampled` and `step_metrics` in another
    thread, and before the step's turn. If the sampling fails, the state that these have is restored.

    >>> class Longest(Callback):
    ...     def on_update_begin(self, step, drawn, batch):
    ...         return {"completion/length_max": max(len(c.token_ids) for g in drawn.groups for c in g.completions)}
    """

    def on_step_begin(self, step: int) -> None:
        """Called before the prompts of a step are chosen."""

    def choose_prompts(self, count: int, step: int, draw: int) -> list[Example] | None:
        """The problems of a draw, all different; None: the next ones of the data. `draw` counts the resamples of
        a step."""
        return None

    def on_groups_sampled(self, step: int, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> None:
        """Called after each draw of a step."""

    def step_metrics(self, step: int) -> dict[str, float]:
        """Return the metrics of a step that was drawn."""
        return {}

    def on_update_begin(self, step: int, drawn: Drawn, batch: TrainingBatch) -> dict[str, float]:
        """Called before the learner reads the batch of a step. Return metrics."""
        return {}

    def on_custom_loss(self) -> None:
        """Called after a batch was trained with a custom loss."""

    def on_evaluate(self, step: int, results: Mapping[str, Any]) -> None:
        """Called after an evaluation; `results` are by way of sampling."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON takes it, with names that no other callback has."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`state` has the names of all callbacks."""


def callbacks_of(run: Run[TrainConfig], task: Task) -> list[Callback]:
    """The callbacks of the table of features that the run asks for."""
    modules = [importlib.import_module(f"grpo.steps.{feature.name}") for feature in FEATURES if feature.callback]
    callbacks = [module.callback(run, task) for module in modules]
    return [callback for callback in callbacks if callback is not None]
