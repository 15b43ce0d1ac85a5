"""What becomes of a step that is not finite: the run ends with the way out, or goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.learner.learner import Learner, NonFiniteStep
from grpo.run.log import RunLog


def take_step(
    learner: Learner,
    step: int,
    take: Callable[[], dict[str, float]],
    run_log: RunLog,
    *,
    batch: Path,
    rate: str,
    **unshown: Any,
) -> dict[str, float]:
    """The metrics of `take()`, a step of `learner`. If it is not finite, no update is counted and the run goes on, or
    NonFiniteStep says what to do: by `learner.on_non_finite`.

    `batch` is the file that holds what was to be learned from, `rate` the option of the learning rate; `unshown` goes
    into the record of events.
    """
    options = learner.options
    try:
        metrics = take()
    except NonFiniteStep as error:
        skipped = learner.skipped_in_a_row + 1
        run_log.event("non_finite", step=step, error=str(error), batch=str(batch), unshown=unshown)
        if options.on_non_finite == "abort" or skipped > options.max_skipped_in_a_row:
            raise NonFiniteStep(
                f"{error}. This update was not made; the batch is in {batch}. Lower {rate} or learner.max_grad_norm, "
                "or set learner.on_non_finite: skip, and go on with --resume auto --force"
            ) from None
        learner.skipped_in_a_row = skipped  # where the run ends, the step was not skipped: it is still to come
        return {"learner/updates": 0.0}
    learner.skipped_in_a_row = 0
    return metrics
