"""How a run is asked to end early, and how it ends: at a step boundary, saved, with an exit code of its own."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from torch import Tensor

from rollout.draft_depth import CostTable
from rollout.group import Prompt, RolloutGroup
from rollout.pool import OnFinished, Pool
from rollout.sampling import SamplingParams


class Stopped(Exception):
    """SIGTERM or --stop_after ended the run at a step boundary; everything up to there is saved."""


class GivenUp(Exception):
    """A signal ended the work in progress between two micro-batches; nothing of it has reached the policy."""


class StopSignal:
    """Inside it the first SIGTERM sets `asked`, for the work to notice; a second one ends the process at once.

    `check` raises GivenUp once a stop was asked for: it is called where the work can be given up.
    """

    asked = False

    def check(self) -> None:
        if self.asked:
            raise GivenUp

    def __enter__(self) -> Self:
        self._previous: Any = signal.getsignal(signal.SIGTERM)
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, self._previous)

    def listen(self) -> None:
        """Once more, where somebody else has taken the signal in the meantime."""
        if not self.asked:
            with suppress(ValueError):  # not the main thread: whoever runs us there handles signals
                signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class InterruptiblePool:
    """A pool whose sampling is given up once a stop was asked for."""

    def __init__(self, pool: Pool, stop: StopSignal) -> None:
        self.pool, self.stop = pool, stop

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
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

    def close(self) -> None:
        self.pool.close()
