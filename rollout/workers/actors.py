"""The Ray actors of a pool: where they run, which of them are there, and how a lost one is replaced.

Why Ray's own means for a lost actor are not used: an actor that Ray restarts has no weights, and Ray hands it the next
call all the same; `ray.kill` of one that hangs may hit its successor. Ray's ActorPool knows no deadlines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from policies.openmp import waiting_variables
from rewards.isolation.variables import OPENED
from rollout.faults import Faults, Kind, RolloutError, why_died
from rollout.places import Places
from rollout.pool import OnReady
from rollout.workers.cluster import Cluster
from rollout.workers.worker import Worker

START_TIMEOUT_S = 600.0  # a worker may take at least so long to start
POLL_S = 0.2  # how often a waiting pool checks whether it should go on waiting

Lost = tuple[Kind, str]  # what was lost with a worker, and why


@dataclass
class Call:
    """What a worker was asked to do, how long it may take, and what is said of it then. `what` is the asker's own."""

    worker: int
    what: Any
    limit_s: float
    late: str
    began: float = field(default_factory=time.monotonic)


class Workers:
    """Actors by number. `arguments` are those of `Worker`.

    Ray reserves their places, and looks for another one when a machine leaves the cluster. Until there is one, the pool
    has fewer workers. `on_ready` gets the number of each worker that has started, and where it is.

    A call that fails raises what the worker has raised; one whose worker dies or is late is told as lost.
    """

    def __init__(
        self,
        places: Places,
        arguments: tuple,
        cluster: Cluster,
        while_waiting: Callable[[], None],
        faults: Faults,
        on_ready: OnReady,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.ray, self.cluster = ray, cluster
        self.places, self.arguments = places, arguments
        self.while_waiting, self.faults, self.on_ready = while_waiting, faults, on_ready
        self.actors: list[Any] = [None] * places.count
        self._starting: dict[Any, Call] = {}
        self._left: set[str] = set()  # what was said of machines that have left
        self._without_place: float | None = None  # since when
        share = {"CPU": float(places.threads)} | ({"GPU": places.gpus} if places.gpus else {})
        self.group = cluster.ask(ray.util.placement_group, [share] * places.count, "SPREAD")
        self._at = partial(PlacementGroupSchedulingStrategy, self.group)
        for i in range(places.count):
            self._start(i)

    def _start(self, i: int) -> None:
        limits = {name: str(self.places.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        of_run = {name: value for name, value in os.environ.items() if name == OPENED}
        actor = self.ray.remote(Worker).options(
            num_cpus=self.places.threads,
            num_gpus=self.places.gpus,
            scheduling_strategy=self._at(i),
            runtime_env={"env_vars": limits | waiting_variables() | of_run | {"TOKENIZERS_PARALLELISM": "false"}},
        )
        self.actors[i] = actor.remote(*self.arguments)
        late = f"it did not start within {START_TIMEOUT_S:g} s"
        self._starting[self.actors[i].ready.remote()] = Call(i, None, START_TIMEOUT_S, late)

    def there(self) -> list[int]:
        """Gives those that have started. One that does not start in time is replaced. Raises RolloutError where there
        is none, and no place for one."""
        for call, where, lost in self.ended(self._starting, wait_s=0) if self._starting else ():
            if not lost:
                self.on_ready(call.worker, where)
            elif self._placed():
                self.replace(call, lost)
            else:
                self.restart(call.worker)  # it has waited for a place
        starting = {call.worker for call in self._starting.values()}
        if len(starting) < len(self.actors) or self._placed():
            self._without_place = None
        elif self._without_place is None:
            self._without_place = time.monotonic()
        elif time.monotonic() > self._without_place + self.places.timeout_s:
            ask = self.cluster.ask
            raise RolloutError(self.places.lacking(ask(self.ray.nodes), ask(self.ray.available_resources)))
        return [i for i in range(len(self.actors)) if i not in starting]

    def _placed(self) -> bool:
        """Tells whether Ray has found a place for every worker."""
        return bool(self.cluster.ask(self.ray.util.placement_group_table, self.group)["state"] == "CREATED")

    def wait_for(self, count: int) -> list[int]:
        """Waits until so many have started, and gives those."""
        while len(there := self.there()) < count:
            self.pause()
        return there

    def call(self, i: int, method: str, *arguments: object) -> object:
        return getattr(self.actors[i], method).remote(*arguments)

    def pause(self) -> None:
        self.while_waiting()
        self.cluster.check()
        time.sleep(POLL_S)

    def ended(self, calls: dict[Any, Call], wait_s: float = POLL_S) -> list[tuple[Call, Any, Lost | None]]:
        """Removes the calls that have ended, at least one unless `wait_s` is over: with what was answered or what was
        lost."""
        self.while_waiting()
        self.cluster.check()
        ready, running = self.ray.wait(list(calls), num_returns=1, timeout=wait_s)
        now, ended = time.monotonic(), list[tuple[Call, Any, Lost | None]]()
        for reference in ready:
            call = calls.pop(reference)
            try:
                ended.append((call, self._get(reference), None))
            except self.ray.exceptions.RayActorError as error:
                ended.append((call, None, why_died(error)))
        if passed := [reference for reference in running if now > calls[reference].began + calls[reference].limit_s]:
            late = self.ray.wait(passed, num_returns=len(passed), timeout=0)[1]  # and have no answer that waits
            ended += [(call := calls.pop(reference), None, ("worker", call.late)) for reference in late]
        return ended

    def _get(self, reference: object) -> Any:
        """Gets what a worker returns; a RolloutError is returned too, since it may hold groups."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.RayActorError:
            raise
        except errors.RayTaskError as error:
            if isinstance(error.cause, RolloutError):
                return error.cause
            raise error.cause or error from None  # without the worker's stack in its message
        except errors.RayError as error:
            self.cluster.check(ask=True)
            raise RolloutError(f"Ray has lost the answer of a rollout worker: {error}") from error

    def replace(self, call: Call, lost: Lost, work: Hashable = None) -> None:
        """The worker of this call is lost, and with it `work`: by default, that it holds the weights."""
        self.cluster.check(ask=True)  # if Ray has died, its workers died first
        kind, why = lost
        if why not in self._left:  # a machine is one loss, however many workers it had
            work = work or ("weights", call.worker)
            self.faults.lost(kind, f"worker {call.worker}", why, work=work, since=call.began)
        self._left |= {why} if kind == "node" else set()
        self.restart(call.worker)

    def restart(self, i: int) -> None:
        """Kill it, since one that only seems lost holds the processor of its successor, and start another."""
        self.cluster.ask(self.ray.kill, self.actors[i])
        self._starting = {ready: call for ready, call in self._starting.items() if call.worker != i}
        self._start(i)

    def close(self) -> None:
        for actor in self.actors:
            self.cluster.ask(self.ray.kill, actor)
        self.actors, self._starting = [], {}
        self.cluster.ask(self.ray.util.remove_placement_group, self.group)
