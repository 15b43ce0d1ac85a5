"""The requests of agents, which Ray's workers decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from rollout.faults import RolloutError
from rollout.group import Completion
from rollout.relay import Relay
from rollout.requests.desk import Answering
from rollout.sampling import SamplingParams
from rollout.workers.actors import Call

CALLS = count()
WAIT_S = 0.02  # that a new request may wait for the completions of others before a worker that is idle gets it


class RayRelay(Relay):
    """Requests with the same `home` are decoded by the same worker, which has kept their caches, while it is there."""

    def __init__(self, pool: Any, version: int, params: SamplingParams, cache_tokens: int, max_rows: int) -> None:
        """`pool` is the RayPool that has the workers."""
        super().__init__(pool.policy, version, max_rows * len(pool.workers.actors))
        self.pool = pool
        self.answering = Answering(next(CALLS), version, params, cache_tokens, max_rows, pool.costs)
        self.actor_of: dict[int, Any] = {}  # by the number of a request that it was asked
        self.calls: dict[Any, Call] = {}  # `what` is the actor, which may have a successor by now

    def exchange(self) -> Mapping[int, Completion]:
        pool, ended = self.pool, dict[int, Completion]()
        if not pool._all_in():  # a worker is new
            pool._settle_workers()
        self._forget_lost()
        self._ask(sorted(pool.ready))
        for call, answer, lost in pool.workers.ended(self.calls, WAIT_S) if self.calls else ():
            if lost:
                pool._replace(call, lost, ("answers", call.worker))
            elif isinstance(answer, RolloutError):
                raise answer
            else:
                pool.faults.done(("answers", call.worker))
                ended |= answer
        return ended

    def _forget_lost(self) -> None:
        """What actors had that were replaced, here or by the pool: their requests are asked again."""
        actors = self.pool.workers.actors
        self.actor_of = {number: actor for number, actor in self.actor_of.items() if actor in actors}
        self.calls = {call: about for call, about in self.calls.items() if about.what in actors}

    def _ask(self, ready: Sequence[int]) -> None:
        """Every worker without a call gets its new requests, and goes on with the others."""
        pool, busy = self.pool, {call.worker for call in self.calls.values()}
        actors = pool.workers.actors
        new: dict[int, dict[int, Any]] = {worker: {} for worker in ready if worker not in busy}
        for number, request in self.requests.items():
            worker = ready[request.home % len(ready)]
            if number not in self.actor_of and worker in new:
                prompt = replace(request.prompt, text="", columns={}, messages=None)  # nothing else is read there
                new[worker][number] = prompt, request.params
                self.actor_of[number] = actors[worker]
        late = f"its answers took longer than {pool.timeout_s:g} s"
        for worker, requests in new.items():
            gone = [number for number in self.gone if self.actor_of.get(number) == actors[worker]]
            if requests or gone or any(self.actor_of.get(number) == actors[worker] for number in self.requests):
                call = pool.workers.call(worker, "answer", self.answering, requests, gone)
                self.calls[call] = Call(worker, actors[worker], pool.timeout_s, late)
                self.gone.difference_update(gone)
