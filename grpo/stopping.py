"""How a run is asked to end early, and how it ends: at a step boundary, saved, with an exit code of its own.

All signals are handled here. Importing this module is quick: they can be handled before anything else is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.run_log import RunLog
    from rollout.draft_depth import CostTable
    from rollout.group import Prompt, RolloutGroup
    from rollout.pool import OnFinished, Pool
    from rollout.sampling import SamplingParams

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal or --stop_after ended the run at a step boundary; everything up to there is saved.

    `number` is the signal's. A run that --stop_after has ended exits as after SIGTERM.
    """

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number or signal.SIGTERM


class GivenUp(Exception):
    """A signal ended the work in progress between two micro-batches; nothing of it has reached the policy."""


class StopSignal:
    """Inside it the first SIGINT or SIGTERM sets `asked`, for the work to notice; a second one ends the process.

    `check` raises GivenUp once a stop was asked for: it is called where the work can be given up. By default the second
    signal ends the process at once, without any clean-up. With `at_once=False` it has the effect that it had outside.
    A signal that the process was started to ignore stays ignored (`nohup`, a shell's background jobs).
    """

    def __init__(self, *, at_once: bool = True) -> None:
        self.number, self._at_once = 0, at_once
        self._usual: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.number != 0

    @property
    def name(self) -> str:
        """Of the signal that asked, such as SIGTERM."""
        return signal.Signals(self.number).name if self.asked else "none"

    def check(self) -> None:
        if self.asked:
            raise GivenUp

    def stopped(self, step: int, of: str = "") -> Stopped:
        """For a run that ends after this step. `of` completes "after step 3"."""
        where = f"after step {step}{of}" if step else f"before step 1{of}"
        return Stopped(f"stopped {where}; go on with --resume auto", self.number)

    def __enter__(self) -> Self:
        usual = {number: signal.getsignal(number) for number in SIGNALS}
        self._usual = {number: signal.SIG_DFL if h is None else h for number, h in usual.items() if h != signal.SIG_IGN}
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _handle(self._usual)

    def listen(self) -> None:
        """Once more, where somebody else has taken a signal in the meantime."""
        after_the_first = dict.fromkeys(self._usual, signal.SIG_DFL) if self._at_once else self._usual
        _handle(after_the_first if self.asked else dict.fromkeys(self._usual, self._stop))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.listen()
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(
                2, b"\nstopping at the last whole step; press Ctrl-C again to end at once, with nothing more saved\n"
            )


def ignore_signals() -> None:
    _handle(dict.fromkeys(SIGNALS, signal.SIG_IGN))


def _handle(handlers: Mapping[int, Any]) -> None:
    with suppress(ValueError):  # not the main thread: whoever runs us there handles signals
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Boundary:
    """The last whole step of a training. However the training ends, it is saved before.

    A context manager around the steps. `write(step)` saves a checkpoint. An exception that leaves the steps must leave
    learner and prompts as they were after the last step that was `reached`. GivenUp becomes Stopped; every other
    exception goes on, after an event `failed` that names the step that is saved. `of`: see `StopSignal.stopped`.
    """

    def __init__(
        self, start: int, write: Callable[[int], object], run_log: RunLog, stop: StopSignal, of: str = ""
    ) -> None:
        self.step = self.saved = start
        self._write, self._run_log, self._stop, self._of = write, run_log, stop, of
        self._refused: int | None = None  # the step whose checkpoint could not be written

    def reached(self, step: int) -> None:
        """What is learned now is this step, whole: what fails from here on does not undo it."""
        self.step = step

    def save(self) -> None:
        if self.saved != self.step:
            self._refused = self.step
            self._write(self.step)
            self.saved, self._refused = self.step, None

    def stopped(self) -> Stopped:
        """For a run that ends here, at a step that is saved."""
        return self._stop.stopped(self.step, self._of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, GivenUp):
            self.save()
            action = "what was in progress is given up"
            self._run_log.event("signal", name=self._stop.name, action=action, saved_step=self.saved)
            raise self.stopped() from None
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            return
        not_saved: dict[str, Any] = {}
        try:
            if self._refused != self.step:
                self.save()
        except Exception as refusal:  # told in the event: the error that ends the run must reach the user
            not_saved = {"not_saved": str(refusal)}
        try:
            self._run_log.event("failed", saved_step=self.saved, **not_saved, error=f"{type(error).__name__}: {error}")
        except OSError as full:  # the error that ends the run is more important than its record
            self._run_log.say(f"failed: saved_step={self.saved} (this event is not recorded: {full})")


class InterruptiblePool:
    """A pool whose sampling is given up once a stop was asked for. A publication that a stop cuts short raises nothing:
    what was learned counts, and the next sampling is given up."""

    def __init__(self, pool: Pool, stop: StopSignal) -> None:
        self.pool, self.stop = pool, stop

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        with suppress(GivenUp):
            self.pool.publish(weights, version)

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        def heard(ended: int) -> None:
            self.stop.check()
            if on_finished:
                on_finished(ended)

        self.stop.check()
        return self.pool.sample(prompts, params, heard)

    def use_costs(self, costs: CostTable | None, rows: int) -> CostTable:
        return self.pool.use_costs(costs, rows)

    def metrics(self) -> dict[str, float]:
        return self.pool.metrics()

    def close(self) -> None:
        self.pool.close()
