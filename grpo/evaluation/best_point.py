"""The validation problems of a run (`data.validation`): at which point of its supervised steps it answers them best."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from grpo.evaluation.evaluate import Evaluation, evaluate
from rollout.pool import Pool

POINTS = 10  # of a training, evenly spaced, at which the validation problems are answered


class BestPoint:
    """Answers the validation problems at POINTS points of a session, and saves the best policy to `folder`.

    The problems are sampled as the session samples, with the same noise at every point. They are neither learned from
    nor reported, so a choice by them leaves the held-out problems unseen. If no point has a score, the policy of the
    last point is saved.
    """

    def __init__(self, session: Any, folder: Path) -> None:
        self.session, self.folder = session, folder
        self.prompts = [session.task.prompt(example, session.policy.tokenizer) for example in session.task.validation]
        self.step = 0  # of the best point so far
        self.value: float | None = None

    def due(self, step: int) -> bool:
        last = self.session.run.last
        return bool(self.prompts) and (step == last or step % max(last // POINTS, 1) == 0)

    def look(self, step: int) -> float | None:
        """Accuracy at this step, or the mean reward where the reward is no accuracy; None if it is not due."""
        if not self.due(step):
            return None
        with closing(self.session.open_pool()) as pool:  # every rank takes part: the pool gets the whole weights
            result: Evaluation = self.session.ranks.from_first(partial(self._answer, pool))
        value = result.reward_mean if result.accuracy is None else result.accuracy
        self.session.run.log.event(
            "validation", step=step, accuracy=value and round(value, 4), problems=len(self.prompts)
        )
        if self._is_best(value) or (step == self.session.run.last and not self.step):
            self.step, self.value = step, value
            self.session.policy.save(self.folder)
        return value

    def _is_best(self, value: float | None) -> bool:
        return value is not None and (self.value is None or value > self.value)

    def _answer(self, pool: Pool) -> Evaluation:
        return evaluate(pool, self.session.task, self.prompts, self.session.collector.sampling, 256)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.value = state["step"], state["value"]
