"""Batches that are sampled while the learner works on earlier ones (contract 12).

With `rollout.staleness: k` the batch of step t is sampled with the weights of step t - 1 - k, the first k + 1 with
those of the start. A thread hands the batches to the workers, one after the other, and between two of them the workers
get the next weights where the schedule says so. What a batch depends on follows from its step, never from the clock:
the moment at which it is ready changes no bit. With k = 1:

    the learner works on     -           batch 1     batch 2     batch 3
    its weights after that   0           1           2           3
    sampled meanwhile        batch 1     batch 2     batch 3     batch 4
    with the weights of      0           0           1           2

Before the learner updates the policy in step t, the batches up to t - 1 + k are complete, the weights of step t - 1 are
published, and batch t + k has begun. So one batch at most needs weights that the learner no longer has. A copy of them
is kept while it is sampled, and where a stop or a failure ends the run meanwhile, they are part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from torch import Tensor

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.learner.learner import Learner
from grpo.learner.state import put_weights
from grpo.steps.collector import Collector
from grpo.steps.loop import Run

POLL_S = 0.5
OLDER = "ahead"  # the older weights, among the tensors of a checkpoint


class Batches:
    """The scored groups of each step. The collector's state and the batches that nothing was learned from yet are its
    own.

    Every rank calls its methods, and rank 0 samples. `start_sampling` comes before the first step. `sync_weights` hands
    the learner's weights to the workers if these hold other ones.
    """

    def __init__(
        self, run: Run[Any], collector: Collector, learner: Learner, sync_weights: Callable[[], object]
    ) -> None:
        self.run, self.collector, self.learner, self.sync_weights = run, collector, learner, sync_weights
        self.staleness = 0 if run.inner else run.config.whole_rollout.staleness
        self.ready: dict[int, Drawn] = {}
        self.next = 1  # the first batch that was not begun
        self.is_asked = False  # a loop of one's own may sample by itself
        self._saved: dict[str, Any] = {}
        self._sampling: tuple[Future[Drawn], Any] | None = None  # batch `next` - 1, and the collector before it
        self._error: BaseException | None = None
        self._before: tuple[int, Any] = (0, None)  # a step whose batch was not sampled ahead, the collector before it
        self._older: tuple[int, dict[str, Tensor]] | None = None  # version and weights of the batch that is sampled
        self._thread = ThreadPoolExecutor(1, "sampling") if self.staleness and run.ranks.first else None

    def start_sampling(self) -> None:
        """Take the batches that a checkpoint of the last step holds. One whose weights the learner has no longer is
        sampled here."""
        state, self._saved, saved = self._saved, {}, self.run.saved
        if not self.staleness:
            return
        if saved is not None and saved.step != self.run.step:  # a loop has loaded it: its batches are of other steps
            state = {}
        from grpo.algorithm.in_flight import drawn_of

        prompt = self.collector.prompt
        self.ready = {int(step): drawn_of(drawn, prompt) for step, drawn in state.get("batches", {}).items()}
        self.next = max([self.run.step, *self.ready]) + 1
        if saved is not None and "older_version" in state:
            newer, version = self.learner.copy_weights(), self.learner.policy_version
            self._hold(state["older_version"], saved.tensors[OLDER])
            self._start()
            self.run.ranks.from_first(self.complete)
            self._hold(version, newer)

    def take_batch(self, step: int) -> Drawn:
        """The batch of this step. Raises what its sampling has raised."""
        is_first, self.is_asked = not self.is_asked, True
        if not self.staleness:
            self.snapshot_before(step)
            return self.run.ranks.from_first(partial(self.collector.collect, step))
        self.next = max(self.next, step) if is_first else self.next  # what a loop has sampled itself is gone
        self.go_on(step - 1, wait=True)
        return self.run.ranks.from_first(partial(self._take_ready, step))

    def snapshot_before(self, step: int, anew: bool = False) -> None:
        """What a step takes from the data comes next, which `undo` takes back: all of it, also where it takes more
        than once. `anew`: from now on."""
        if anew or self._before[0] != step:
            self._before = step, self.collector.snapshot()

    def _take_ready(self, step: int) -> Drawn:
        if step not in self.ready:
            self.complete()
        self.ready = {other: drawn for other, drawn in self.ready.items() if other >= step}
        return self.ready[step]

    def go_on(self, step: int, wait: bool = False) -> None:
        """Begin the batches up to `step` + ahead, each when the one before is complete: all of them where it `wait`s,
        those that can begin now where it does not. The learner holds the weights of `step` - 1, or no batch is left."""
        while self.is_asked and self.next <= min(step + self.staleness, self.run.last):
            if wait:
                self.run.ranks.from_first(self.complete)
            elif not self.run.ranks.from_first(self._completed):
                return
            self.sync_weights()
            self._start()

    def before_update(self, step: int) -> None:
        """The learner has the weights of `step` - 1 for the last time."""
        if not self.staleness or not self.is_asked:
            return
        self.go_on(step, wait=True)
        if self.staleness == 1:  # the next step waits for this batch anyway, and no copy is needed
            self.run.ranks.from_first(self.complete)
        else:
            complete = self.run.ranks.from_first(self._completed)
            self._older = None if complete else (self.learner.policy_version, self.learner.copy_weights())
            if not complete:
                self.collector.pool.keep_weights()  # for a worker that takes the place of one that died

    def _completed(self) -> bool:
        """Tells whether no batch is being sampled now. Raises what the sampling has raised, if it has ended."""
        if idle := self._idle():
            self.complete()
        return idle

    def _idle(self) -> bool:
        return self._sampling is None or self._sampling[0].done()

    def _start(self) -> None:
        """Sample the next batch from now on, with the weights that the workers hold."""
        step, self.next = self.next, self.next + 1
        if self._thread is not None:
            before = self.collector.snapshot()
            self._sampling = self._thread.submit(self.collector.collect, step, True), before

    def complete(self) -> None:
        """Wait for the batch that is sampled. Raises what its sampling has raised."""
        self.wait_for_sampling()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait_for_sampling(self) -> None:
        """Waits until nothing is sampled. A batch that failed leaves no trace, and its error waits for `complete`."""
        if self._sampling is None:
            return
        (future, before), self._sampling = self._sampling, None
        try:
            with self.run.timed("time/wait"):
                done = False
                while not done:  # with pauses, since Python handles a signal that came just before only between them
                    done = bool(wait([future], POLL_S).done)
                self.ready[self.next - 1] = future.result()
        except BaseException as error:  # of the thread: raised where the batch is asked for
            self.next -= 1
            self.collector.put_back(before)
            self._error = error

    # ---- its state --------------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """The step in progress is undone. What was sampled ahead stays: its weights were the right ones."""
        self.wait_for_sampling()
        step, before = self._before
        if step > self.run.step:
            self.collector.put_back(before)

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON takes it, when the batch that is sampled is complete."""
        self.wait_for_sampling()
        state = self.collector.state_dict()
        if self.staleness:
            from grpo.algorithm.in_flight import plain

            waiting = {step: drawn for step, drawn in self.ready.items() if step > self.run.step}
            state["batches"] = {str(step): plain(drawn) for step, drawn in waiting.items()}
        if self._lacks:
            assert self._older is not None
            state["older_version"] = self._older[0]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads all but the batches, for which `start_sampling` makes the prompts anew from the data."""
        self.collector.load_state_dict(state)
        self._saved, self._older, self._error = state, None, None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The older weights, where the batch that needs them could not be completed."""
        if self._older is None or not self.run.ranks.from_first(lambda: self._lacks):
            return {}
        return {OLDER: self._older[1]}

    @property
    def _lacks(self) -> bool:
        """The step that is saved has learned, and a batch that the weights before it sample is not there."""
        return self._older is not None and self.next <= min(self.run.step + self.staleness, self.run.last)

    def _hold(self, version: int, weights: object) -> None:
        """The learner takes these weights, and the workers get them."""
        put_weights(weights, self.learner.policy, self.learner.masters)
        self.learner.policy_version = version
        self.sync_weights()
