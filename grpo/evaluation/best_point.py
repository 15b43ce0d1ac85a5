"""The validation problems of a run (`data.validation`): at which point of its supervised steps it answers them best."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from grpo.evaluation.evaluate import Evaluation, evaluate

POINTS = 10  # of a training, evenly spaced, at which the validation problems are answered


class BestPoint:
    """Answers the validation problems at POINTS points of a session, and saves the best policy to `folder`.

    The problems are sampled once each, at the temperature of the run, with the same noise at every point. They are
    neither learned from nor reported, so a choice by them leaves the held-out problems unseen.
    """

    def __init__(self, session: Any, folder: Path) -> None:
        self.session, self.folder = session, folder
        self.prompts = [session.task.prompt(example, session.policy.tokenizer) for example in session.task.validation]
        self.step, self.value = 0, -1.0  # of the best point so far

    def due(self, step: int) -> bool:
        last = self.session.run.last
        return bool(self.prompts) and (step == last or step % max(last // POINTS, 1) == 0)

    def look(self, step: int) -> float | None:
        """Accuracy at this step, or the mean reward where the reward is no accuracy; None if it is not due."""
        if not self.due(step):
            return None
        result: Evaluation = self.session.ranks.from_first(self._answer)
        value = result.reward_mean if result.accuracy is None else result.accuracy
        self.session.run.log.event(
            "validation", step=step, accuracy=value and round(value, 4), problems=len(self.prompts)
        )
        if value is not None and value > self.value:
            self.step, self.value = step, value
            self.session.policy.save(self.folder)
        return value

    def _answer(self) -> Evaluation:
        session = self.session
        with closing(session.open_pool()) as pool:
            return evaluate(pool, session.task, self.prompts, session.collector.sampling, 256)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.value = state["step"], state["value"]
