"""Batches that are sampled while the learner works on the one before (contract 12).

With `rollout.ahead: 1` the batch of step t is sampled with the weights of step t - 2, the first two with those of the
start. A thread hands it to the workers, one batch after the other. What a batch depends on follows from its step, never
from the clock: at which moment it is ready changes no bit.

A step moves the policy only when the next batch is complete. So a stop or a failure either undoes the step, whose
weights are still those that the next batch needs, or finds that batch ready to be saved.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.collector import Collector
from grpo.config.run import TrainConfig
from grpo.loop import Run
from rewards.group_score import GroupScore, RewardFailure
from rollout.group import Completion, DraftStats, RolloutGroup, ToolStats

BY_ENVIRONMENT = ("text", "token_ids", "messages")  # parts of a prompt to which an environment may have added


class Batches:
    """The scored groups of each step. Those that nothing was learned from yet are its state.

    `collector` is set before the first batch is asked for.
    """

    collector: Collector

    def __init__(self, run: Run[TrainConfig]) -> None:
        self.run, self.ahead = run, run.config.rollout.ahead
        self.ready: dict[int, Drawn] = {}
        self._saved: dict[str, Any] = {}
        self._sampling: tuple[int, Future[Drawn], dict[str, Any], list] | None = None
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, "sampling") if self.ahead else None

    def take(self, step: int) -> Drawn:
        """The batch of this step. Raises what its sampling has raised."""
        if not self.ahead:
            return self.collector.collect(step)
        self._restore()
        if step not in self.ready:
            self.start(step)
            self.complete()
        self.ready = {other: drawn for other, drawn in self.ready.items() if other >= step}
        return self.ready[step]

    def start(self, step: int) -> None:
        """Sample this batch from now on, with the weights that the workers hold."""
        if self._thread is None or step > self.run.last or step in self.ready or self._error is not None:
            return
        self.settle()
        before = self.collector.curriculum.state_dict(), list(self.collector.later)
        self._sampling = step, self._thread.submit(self.collector.collect, step, True), *before

    def complete(self) -> None:
        """Wait for the batch that is sampled. Raises what its sampling has raised."""
        self.settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Wait until nothing is sampled. A batch that failed leaves no trace, and its error waits for `complete`."""
        if self._sampling is None:
            return
        (step, future, curriculum, later), self._sampling = self._sampling, None
        try:
            with self.run.timed("time/wait"):
                self.ready[step] = future.result()
        except BaseException as error:  # of the thread: raised where the batch is asked for
            self.collector.curriculum.load_state_dict(curriculum)
            self.collector.later, self._error = later, error

    def state_dict(self) -> dict[str, Any]:
        """As JSON takes it. It waits for the batch that is sampled, so it is asked before the curriculum's."""
        if self._saved:
            return self._saved
        self.settle()
        waiting = {str(step): _plain(drawn) for step, drawn in self.ready.items() if step > self.run.step}
        return {"batches": waiting, "later": [list(entry) for entry in self.collector.later]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What is sampled now is given up."""
        self.settle()
        self.ready, self._error, self._saved = {}, None, state

    def _restore(self) -> None:
        """Prompts are made anew from the data, which the collector has."""
        state, self._saved = self._saved, {}
        for step, drawn in state.get("batches", {}).items():
            self.ready[int(step)] = _drawn(drawn, self.collector)
        if state:
            self.collector.later = [(step, prompt_id, rate) for step, prompt_id, rate in state["later"]]


def _plain(value: Any) -> Any:
    """Dataclasses, tensors of integers and what JSON knows, as JSON takes it; of a prompt what is not in the data."""
    if isinstance(value, RolloutGroup):
        return {
            "prompt_id": value.prompt.prompt_id,
            "prompt": {name: getattr(value.prompt, name) for name in BY_ENVIRONMENT},
            "completions": _plain(value.completions),
            "prompt_routing": _plain(value.prompt_routing),
        }
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "numbers": value.tolist()}
    if isinstance(value, list | tuple):
        numbers = bool(value) and isinstance(value[0], int | float)  # one for each token: they are many
        return list(value) if numbers else [_plain(entry) for entry in value]
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _drawn(state: dict[str, Any], collector: Collector) -> Drawn:
    """The inverse of `_plain`."""

    def group(found: dict[str, Any]) -> RolloutGroup:
        completions = [completion(each) for each in found["completions"]]
        prompt = replace(collector.prompt(found["prompt_id"]), **found.get("prompt", {}))
        return RolloutGroup(prompt, completions, _tensor(found["prompt_routing"]))

    def completion(found: dict[str, Any]) -> Completion:
        parts = {"draft": DraftStats(**found["draft"]), "routing": _tensor(found["routing"])}
        if found.get("tools") is not None:
            parts["tools"] = ToolStats(**found["tools"])
        return Completion(**found | parts)

    def score(found: dict[str, Any]) -> GroupScore:
        return GroupScore(**found | {"errors": [RewardFailure(**error) for error in found["errors"]]})

    return Drawn(
        **state
        | {
            "groups": [group(each) for each in state["groups"]],
            "scores": [score(each) for each in state["scores"]],
            "replaced": [(group(one), score(other)) for one, other in state["replaced"]],
        }
    )


def _tensor(found: dict[str, Any] | None) -> Tensor | None:
    return None if found is None else torch.tensor(found["numbers"], dtype=getattr(torch, found["dtype"]))
