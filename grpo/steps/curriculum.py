"""Which prompts a step trains on.

Everything is a function of the seed and the step, never of a clock (contract 9).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.config.run import TrainConfig
from grpo.learner.optimizer import ramp
from grpo.steps.callback import Callback
from grpo.task.task import Task
from rewards.data.examples import Example

if TYPE_CHECKING:
    from grpo.steps.loop import Run

METRICS = {
    "curriculum/open": "training examples that are open yet (curriculum.shortest_share), fraction",
    "curriculum/seen": "training examples that were drawn at least once, fraction",
}


def callback(run: Run[TrainConfig], task: Task) -> Callback:
    return Curriculum(run, task)


class Curriculum(Callback):
    """Which problems a step draws. Without an option it has no say.

    `shortest_share` opens the examples by the length of their gold solution, shortest first. Of the open examples,
    those drawn least often come first; a resample takes others than the step already has, if there are any.

    >>> curriculum = Curriculum(run, task)              # of a run with curriculum.shortest_share: 0.3
    >>> [example] = curriculum.choose_prompts(1, step=1)
    """

    def __init__(self, run: Run[TrainConfig], task: Task) -> None:
        self.options, self.seed = run.config.curriculum, run.config.seed
        self.examples = sorted(task.unsolved, key=lambda example: len(example.solution))
        self.seen: Counter[str] = Counter()
        self.of_step: set[str] = set()  # drawn in this step

    @property
    def chooses(self) -> bool:
        return self.options.shortest_share < 1

    def open(self, step: int) -> Sequence[Example]:
        share = ramp(step, self.options.steps, self.options.shortest_share, 1.0)
        return self.examples[: math.ceil(round(share * len(self.examples), 6))]  # 0.2 + 0.4 is no 0.6

    def choose_prompts(self, count: int, step: int, draw: int = 0) -> list[Example] | None:
        """`count` different examples. Raises ValueError if there are too few."""
        if not self.chooses:
            return None
        candidates = self.open(step)
        if len(candidates) < count:
            candidates = self.examples[:count]
        if len(candidates) < count:
            raise ValueError(f"a step cannot take {count} different prompts from {len(candidates)} examples")
        noise = random.Random(f"curriculum/{self.seed}/{step}/{draw}")
        if draw == 0:
            self.of_step = set()

        def order(example: Example) -> tuple[bool, float, float]:
            name = example.example_id
            return name in self.of_step, self.seen[name], 1.0 - noise.random()

        chosen = sorted(candidates, key=order)[:count]
        names = [example.example_id for example in chosen]
        self.of_step.update(names)
        self.seen.update(names)
        return chosen

    def step_metrics(self, step: int) -> dict[str, float]:
        """curriculum/* where it has a say."""
        if not self.chooses:
            return {}
        return {
            "curriculum/open": len(self.open(step)) / len(self.examples),
            "curriculum/seen": len(self.seen) / len(self.examples),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = Counter(state["seen"])
