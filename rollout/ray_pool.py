"""Rollout workers as Ray actors: shards are handed out to them, weights published, and lost ones replaced."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from policies.openmp import waiting_variables
from policies.policy import Policy
from rollout.cluster import Cluster
from rollout.depth import CostTable
from rollout.engine import OnFinished, RolloutError
from rollout.faults import Faults, Kind, OnLost, why_died
from rollout.group import Prompt, RolloutGroup
from rollout.publication.canaries import other_canaries
from rollout.publication.digests import Held
from rollout.publication.message import Message, Sender
from rollout.sampling import SamplingParams
from rollout.shard import shards
from rollout.worker import Worker

TIMEOUT_S = 3600.0  # the default of rollout.timeout_s
PUBLISH_TIMEOUT_S = 600.0  # and of rollout.publish_timeout_s
START_TIMEOUT_S = 600.0  # a worker may take at least so long to start and to confirm weights
# From here on compressed differences (2.4 ms a MB, a third to two thirds fewer bytes) beat 10 Gb/s out of one machine.
DELTA_NODES = 8
POLL_S = 0.2  # how often a waiting pool checks whether it should go on waiting


class RayPool:
    """Ray actors with an engine each. A worker that dies or is late is replaced, and its shard is sampled again, which
    gives the same tokens. Raises RolloutError when workers are lost again and again, or when Ray itself dies."""

    def __init__(
        self,
        policy: Policy,
        workers: int,
        dtype: torch.dtype,
        threads: int,
        prompts_per_shard: int,
        address: str | None,
        timeouts_s: tuple[float, float],
        deltas: bool | None,
        while_waiting: Callable[[], None],
        on_lost: OnLost,
    ) -> None:
        import ray

        self.ray = ray
        self.prompts_per_shard, self.threads = prompts_per_shard, threads
        self.timeout_s, self.publish_timeout_s = timeouts_s  # of a shard, of a publication
        self.while_waiting, self.faults = while_waiting, Faults(on_lost)
        self.cluster = Cluster(workers * threads, address)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        held = next(policy.parameters()).dtype
        precisions = (str(kind).removeprefix("torch.") for kind in (held, dtype))
        self.arguments = (policy.skeleton(), *precisions, self.device, threads)
        nodes = sum(node["Alive"] for node in ray.nodes())
        self.sender = Sender(deltas=nodes >= DELTA_NODES if deltas is None else deltas)
        self.published: int | None = None  # the version that every worker has confirmed
        self.confirmed: dict[int, int | None] = {}  # the version of each worker
        self.costs: CostTable | None = None
        # Prompts and parameters of the canaries of this version, and what a worker has sampled that passed them.
        self.canaries: tuple[Sequence[Prompt], SamplingParams, list[RolloutGroup]] | None = None
        self.precision = dtype
        self._unreported: defaultdict[str, float] = defaultdict(float)
        self.workers: list[Any] = []
        try:
            self.workers += [self._start() for _ in range(workers)]
            self.publish(policy.publication(), 0)
        except BaseException:  # also a stop of the run: a pool whose making failed can be closed only here
            self.close()
            raise

    def _start(self) -> Any:
        limits = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        actor = self.ray.remote(Worker).options(
            num_cpus=self.threads,
            num_gpus=1 if self.device == "cuda" else 0,
            runtime_env={"env_vars": limits | waiting_variables() | {"TOKENIZERS_PARALLELISM": "false"}},
        )
        return actor.remote(*self.arguments)

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Every worker confirms the digests of what it holds before any worker samples with it (contract 5).

        Where the policy has adapters, a worker that holds the version before gets A and B, and what else is trained.
        """
        self.published, self.canaries = None, None
        self.faults.published()
        self._confirm(range(len(self.workers)), self.sender.take(weights, version))

    def _confirm(self, workers: Iterable[int], change: Message | None = None) -> None:
        """These workers take the last publication over, all at once. A worker gets all of it where it does not hold
        what `change` follows, and where the digest of a tensor differs.

        A message goes through shared memory, once for each node, and leaves it when this returns; see
        rollout/cluster.py. If this is cut short, no worker samples before the next publication.
        """
        self.published = None
        self.cluster.check()
        started, sent = time.monotonic(), dict[bool, Any]()
        running: dict[Any, tuple[int, bool, float]] = {}
        began: dict[int, float] = {}

        def send(i: int, everything: bool = False) -> None:
            former = self.confirmed.pop(i, None)
            everything = everything or change is None or former is None or former != change.since
            if everything not in sent:
                message = self.sender.everything() if change is None or everything else change
                sent[everything] = self.cluster.put(message, self.faults, self.publish_timeout_s, self.while_waiting)
                self._unreported["publish/bytes"] += message.bytes
            limit = max(self.publish_timeout_s, START_TIMEOUT_S if former is None else 0.0)
            began[i] = time.monotonic()
            reference = self.workers[i].publish.remote(sent[everything])
            running[reference] = i, everything, began[i] + limit

        for i in workers:
            send(i)
        late = f"it took longer than rollout.publish_timeout_s={self.publish_timeout_s:g} to take the weights over"
        while running:
            deadlines = {reference: deadline for reference, (*_, deadline) in running.items()}
            for reference, held, lost in self._ended(deadlines, late):
                i, everything, _ = running.pop(reference)
                if lost:
                    self._replace(i, *lost, ("publication", i), began[i])
                    send(i)
                elif (wrong := self.sender.difference(held)) is None:
                    self.confirmed[i] = self.sender.version
                    self.faults.done(("publication", i))
                elif not everything:
                    send(i, everything=True)
                else:
                    raise RolloutError(
                        f"worker {i} does not hold what was published as version {self.sender.version}: the first "
                        f"tensor that differs is {wrong}"
                    )
        self._unreported["time/confirm"] += time.monotonic() - started
        self.published = self.sender.version

    def _answer(self, i: int, method: str, *arguments: Any) -> Any:
        """What worker i answers. If the worker is lost, its successor is asked."""
        limit = max(self.timeout_s, START_TIMEOUT_S)
        while True:
            self.cluster.check()
            reference, began = getattr(self.workers[i], method).remote(*arguments), time.monotonic()
            ended: list[tuple[Any, Any, tuple[Kind, str] | None]] = []
            while not ended:
                ended = self._ended({reference: began + limit}, f"no answer to {method} after {limit:g} s")
            [(_, answer, lost)] = ended
            if not lost:
                self.faults.done(method)
                return answer
            self._replace(i, *lost, method, began)

    def _wait(self, references: Sequence[Any]) -> list[Any]:
        """One of the references that is ready, or none after POLL_S."""
        self.while_waiting()
        self.cluster.check()
        return self.ray.wait(list(references), num_returns=1, timeout=POLL_S)[0]

    def _late(self, deadlines: Mapping[Any, float]) -> list[Any]:
        """References that are not ready though their deadline has passed."""
        passed = [reference for reference, deadline in deadlines.items() if time.monotonic() > deadline]
        return self.ray.wait(passed, num_returns=len(passed), timeout=0)[1] if passed else []

    def _ended(self, deadlines: Mapping[Any, float], late: str) -> list[tuple[Any, Any, tuple[Kind, str] | None]]:
        """References that are ready, with their answers or why their worker is lost, and those whose time is up."""
        ended: list[tuple[Any, Any, tuple[Kind, str] | None]] = []
        for reference in self._wait(list(deadlines)):
            try:
                ended.append((reference, self._get(reference), None))
            except self.ray.exceptions.RayActorError as error:
                ended.append((reference, None, why_died(error)))
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause or error from None  # without the worker's stack in its message
        return ended + [(reference, None, ("worker", late)) for reference in self._late(deadlines)]

    def _get(self, reference: Any) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except (errors.RayActorError, errors.RayTaskError):
            raise
        except errors.RayError as error:
            self.cluster.check(ask=True)
            raise RolloutError(f"Ray has lost the answer of a rollout worker: {error}") from error

    def _replace(self, i: int, kind: Kind, why: str, work: Hashable, since: float) -> None:
        """Worker i is lost, and with it `work`, which had begun at `since`."""
        self.cluster.check(ask=True)  # if Ray has died, its workers died first
        self.faults.lost(kind, f"worker {i}", why, work=work, since=since)
        self.confirmed.pop(i, None)
        self.ray.kill(self.workers[i])  # if it only seems lost, it still holds the processor of its successor
        self.workers[i] = self._start()

    def _version(self) -> int:
        if self.published is None:
            raise RolloutError("the last publication was not confirmed by every worker: publish the weights again")
        return self.published

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        version = self._version()
        waiting = list(enumerate(shards(prompts, self.prompts_per_shard)))[::-1]
        done: dict[int, list[RolloutGroup]] = {}
        faults: dict[int, str] = {}
        running: dict[Any, tuple[int, int, Sequence[Prompt], float]] = {}
        idle = list(range(len(self.workers)))

        def again(i: int, number: int, shard: Sequence[Prompt], kind: Kind, reason: str, began: float) -> None:
            self._replace(i, kind, reason, ("shard", number), began)
            self._admit(i)
            waiting.append((number, shard))

        while waiting or running:
            while waiting and idle:
                number, shard = waiting.pop()
                i = idle.pop(0)
                began = time.monotonic()
                reference = self.workers[i].sample.remote(list(shard), params, version, self.costs)
                running[reference] = i, number, shard, began
            finished = self._wait(list(running))
            late = self._late({reference: began + self.timeout_s for reference, (*_, began) in running.items()})
            for reference in [*finished, *late]:
                i, number, shard, began = running.pop(reference)
                try:
                    if reference in finished:
                        done[number] = self._get(reference)
                        self.faults.done(("shard", number))
                        if on_finished:
                            on_finished(len(shard) * params.group_size)
                    else:
                        late_by = f"its shard took longer than rollout.timeout_s={self.timeout_s:g}"
                        again(i, number, shard, "worker", late_by, began)
                except self.ray.exceptions.RayActorError as error:
                    again(i, number, shard, *why_died(error), began)
                except self.ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, RolloutError):
                        raise error.cause or error from None  # without the worker's stack in its message
                    done[number] = error.cause.groups
                    faults[number] = str(error.cause)
                idle.append(i)
        groups = [group for number in sorted(done) for group in done[number]]
        if faults:
            raise RolloutError("\n".join(faults[number] for number in sorted(faults)), groups)
        return groups

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        self.canaries = None
        found = self._sample_on(range(len(self.workers)), prompts, params)
        self.canaries = prompts, params, found[0]
        return {f"worker {i}": found[i] for i in sorted(found)}

    def _sample_on(
        self, workers: Iterable[int], prompts: Sequence[Prompt], params: SamplingParams
    ) -> dict[int, list[RolloutGroup]]:
        """The groups of all prompts by each of these workers; a lost one is replaced, and its successor asked."""
        version, groups, running = self._version(), dict[int, list[RolloutGroup]](), dict[Any, tuple[int, float]]()

        def ask(i: int) -> None:
            reference = self.workers[i].sample.remote(list(prompts), params, version, self.costs)
            running[reference] = i, time.monotonic()

        for i in workers:
            ask(i)
        late = f"its canaries took longer than rollout.publish_timeout_s={self.publish_timeout_s:g}"
        while running:
            deadlines = {reference: began + self.publish_timeout_s for reference, (_, began) in running.items()}
            for reference, answer, lost in self._ended(deadlines, late):
                i, began = running.pop(reference)
                if lost:
                    self._replace(i, *lost, ("canaries", i), began)
                    self._confirm([i])
                    ask(i)
                else:
                    groups[i] = answer
                    self.faults.done(("canaries", i))
        return groups

    def _admit(self, i: int) -> None:
        """A worker that takes another's place gets the weights, and passes the canaries that the others have passed."""
        self._confirm([i])
        if self.canaries is not None:
            prompts, params, passed = self.canaries
            own = self._sample_on([i], prompts, params)[i]
            if fault := other_canaries(own, passed, self.precision):
                raise RolloutError(f"worker {i}, which is new, {fault} (version {self.published})")

    def held(self) -> dict[str, Held]:
        return {}

    def use_costs(self, costs: CostTable | None, rows: int) -> CostTable:
        """One worker measures them alone, with the threads that a worker has."""
        if costs is None:
            before = self.workers[0]
            costs = self._answer(0, "measure_costs", rows)
            if self.workers[0] is not before:
                self._admit(0)
        self.costs = costs
        return costs

    def metrics(self) -> dict[str, float]:
        metrics = self.faults.metrics() | self._unreported
        self._unreported.clear()
        return metrics

    def close(self) -> None:
        with suppress(RolloutError):  # if the cluster has died, no worker is left
            self.cluster.check()
            for worker in self.workers:
                self.ray.kill(worker)
        self.workers = []
        self.cluster.close()
