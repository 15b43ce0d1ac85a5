"""A step of a run, as its loop is given it."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Self

from grpo.learner.batch import TrainingBatch
from grpo.learner.terms.term import Work


class Step(int):
    """The number of a step, and what became of it so far.

    `metrics` are those of its line in metrics.jsonl. `batches` are what it has learned from, in the order of their
    first `forward_backward`, and `read` the work on them, one for each loss. `works` have made updates after which
    nobody has called `Learner.finish`. `moved` tells whether an update has changed the policy, `recorded` whether the
    step has its line, `kept` whether rollouts/ has all that is known of its completions. `sampled` counts tokens,
    whether or not they are learned from. Where a step is sent to another process, its number is.

    >>> for step in session.run.steps():
    ...     session.learn(session.prepare(session.draw(step)))
    ...     session.record(step, {"batches": len(step.batches)})
    """

    metrics: defaultdict[str, float]
    batches: list[TrainingBatch]
    read: list[Work]
    works: list[Work]
    moved: bool
    recorded: bool
    kept: bool
    sampled: int
    started: float  # seconds, by the clock of `perf_counter`

    def __new__(cls, number: int) -> Self:
        step = super().__new__(cls, number)
        step.metrics = defaultdict(float)
        step.batches, step.read, step.works = [], [], []
        step.moved, step.recorded, step.kept = False, False, True
        step.sampled, step.started = 0, time.perf_counter()
        return step

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)
