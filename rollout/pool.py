"""The pool of engines: it cuts prompts into shards, publishes weights and replaces lost workers.

Without workers it is one engine in this process. The shards of a step depend on the step alone, and a forward never
mixes two of them, so tokens depend neither on the number of workers, nor on their speed, nor on a retry (contract 4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from policies.lora import has_adapter
from policies.openmp import waiting_variables
from policies.policy import Policy, digest
from rollout.cluster import Cluster
from rollout.cluster import start_ray as start_ray
from rollout.depth import CostTable
from rollout.engine import Engine, RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams
from rollout.worker import PackedWeights, Worker, pack, unpack

MAX_RESTARTS = 3  # of all workers together, between two publications
TIMEOUT_S = 3600.0  # the default of rollout.timeout_s
START_TIMEOUT_S = 600.0  # a worker may take at least so long to start and to confirm weights
POLL_S = 0.2  # how often a waiting pool checks whether it should go on waiting

OnFinished = Callable[[int], None]
OnLost = Callable[[int, str, str], None]


class Pool(Protocol):
    """A sampler of groups. `sample` returns them in the order of the prompts. If some prompts fail, the others are
    still sampled, and the RolloutError that names the failed ones has the other `groups`."""

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None: ...

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]: ...

    def use_costs(self, costs: CostTable | None, rows: int) -> CostTable:
        """Sets the table that every depth controller uses; without `costs` it is measured at up to `rows` live rows."""
        ...

    def metrics(self) -> dict[str, float]:
        """`rollout/restarts` since the last call; empty without workers."""
        ...

    def close(self) -> None: ...


def open_pool(
    policy: Policy,
    workers: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    prompts_per_shard: int = 8,
    address: str | None = None,
    timeout_s: float = TIMEOUT_S,
    while_waiting: Callable[[], None] = lambda: None,
    on_lost: OnLost = lambda worker, reason, action: None,
) -> Pool:
    """A pool to which the weights of `policy` are published.

    Without workers it reads the weights of `policy` itself where it can, see LocalPool.

    The other arguments are for Ray workers. A worker that takes longer than `timeout_s` for a shard is replaced, as if
    it had died. `while_waiting` is called several times a second while the pool waits for workers; an exception that it
    raises ends the wait. `on_lost` gets the number of a worker that died or was late, the reason, and what is done.
    """
    if workers == 0:
        return LocalPool(policy, dtype, prompts_per_shard)
    return RayPool(policy, workers, dtype, threads, prompts_per_shard, address, timeout_s, while_waiting, on_lost)


def _copy(policy: Policy) -> Policy:
    """The same policy with its adapters merged."""
    copy = Policy.from_skeleton(policy.skeleton(), next(policy.parameters()).dtype).to(policy.device)
    copy.load_weights(policy.weights())
    return copy


def shards(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


class LocalPool:
    """One engine in this process, without Ray.

    It has no copy of a policy that has its own precision, no adapters and no shards: it reads that policy's weights,
    and a publication derives anew what follows from them. If they have moved since, it refuses to sample (contract 5).
    When other weights are published to it, it makes a copy.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype, prompts_per_shard: int) -> None:
        split = any(isinstance(parameter, DTensor) for parameter in policy.parameters())
        self.shares = policy.trunk.dtype == dtype and not has_adapter(policy) and not split
        self.engine, self.prompts_per_shard = Engine(policy if self.shares else _copy(policy), dtype), prompts_per_shard
        self._published = self._writes()

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        own = self.engine.policy.state_dict() if self.shares else {}
        if any(name in own and own[name].data_ptr() != tensor.data_ptr() for name, tensor in weights.items()):
            self.shares, self.engine.policy = False, _copy(self.engine.policy)
        self.engine.publish(weights, version)
        self._published = self._writes()

    def _writes(self) -> int:
        """How often torch has written to the weights that are shared."""
        shared = self.engine.policy.state_dict(keep_vars=True).values() if self.shares else ()
        return sum(tensor._version for tensor in shared)

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        if self._writes() != self._published:
            raise RolloutError("the policy has learned since its last publication: publish its weights first")
        groups, faults = [], []
        for shard in shards(prompts, self.prompts_per_shard):
            try:
                groups += self.engine.sample(shard, params, on_finished)
            except RolloutError as error:
                groups += error.groups
                faults.append(str(error))
        if faults:
            raise RolloutError("\n".join(faults), groups)
        return groups

    def use_costs(self, costs: CostTable | None, rows: int) -> CostTable:
        self.engine.costs = costs or self.engine.measure_costs(min(rows, self.engine.max_rows))
        return self.engine.costs

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


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
        timeout_s: float,
        while_waiting: Callable[[], None],
        on_lost: OnLost,
    ) -> None:
        import ray

        self.ray = ray
        self.prompts_per_shard, self.threads, self.timeout_s = prompts_per_shard, threads, timeout_s
        self.while_waiting, self.on_lost = while_waiting, on_lost
        self.cluster = Cluster(workers * threads, address)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        held = next(policy.parameters()).dtype
        precisions = (str(kind).removeprefix("torch.") for kind in (held, dtype))
        self.arguments = (policy.skeleton(), *precisions, self.device, threads)
        self.published: tuple[PackedWeights, str, int] | None = None
        self.costs: CostTable | None = None
        self.restarts = self._unreported_restarts = 0
        self.workers: list[Any] = []
        try:
            self.workers += [self._start() for _ in range(workers)]
            self.publish(policy.weights(), 0)
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
        """Every worker confirms the digest of what it holds before any worker samples with it (contract 5)."""
        packed = {name: (dtype, shape, data.copy()) for name, (dtype, shape, data) in pack(weights).items()}
        self.published = packed, digest(unpack(packed)), version
        self.restarts = 0
        self._confirm(*range(len(self.workers)))

    def _confirm(self, *workers: int) -> None:
        """The weights go through shared memory and leave it when this returns; see rollout/cluster.py. If it is cut
        short, no worker samples before the next publication."""
        assert self.published is not None
        (packed, expected, version), self.published = self.published, None
        self.cluster.check()
        reference = self.ray.put(packed)
        for i in workers:
            got = self._answer(i, "publish", reference, version)
            if got != expected:
                raise RolloutError(f"worker {i} holds weights {got}, not the published {expected} (version {version})")
        self.published = packed, expected, version

    def _answer(self, i: int, method: str, *arguments: Any) -> Any:
        """What worker i answers. If the worker is lost, its successor is asked."""
        limit = max(self.timeout_s, START_TIMEOUT_S)
        while True:
            self.cluster.check()
            reference, deadline = getattr(self.workers[i], method).remote(*arguments), time.monotonic() + limit
            ready = False
            while not ready and time.monotonic() < deadline:
                ready = bool(self._wait([reference]))
            try:
                if ready:
                    return self._get(reference)
                self._replace(i, f"no answer to {method} after {limit:g} s")
            except self.ray.exceptions.RayActorError as error:
                self._replace(i, f"it died: {error}")

    def _wait(self, references: Sequence[Any]) -> list[Any]:
        """One of the references that is ready, or none after POLL_S."""
        self.while_waiting()
        self.cluster.check()
        return self.ray.wait(list(references), num_returns=1, timeout=POLL_S)[0]

    def _late(self, deadlines: Mapping[Any, float]) -> list[Any]:
        """References that are not ready though their deadline has passed."""
        passed = [reference for reference, deadline in deadlines.items() if time.monotonic() > deadline]
        return self.ray.wait(passed, num_returns=len(passed), timeout=0)[1] if passed else []

    def _get(self, reference: Any) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except (errors.RayActorError, errors.RayTaskError):
            raise
        except errors.RayError as error:
            self.cluster.check(ask=True)
            raise RolloutError(f"Ray has lost the answer of a rollout worker: {error}") from error

    def _replace(self, i: int, why: Exception | str) -> None:
        self.cluster.check(ask=True)  # if Ray has died, its workers died first
        reason = " ".join(str(why).split())
        self.restarts += 1
        given_up = self.restarts > MAX_RESTARTS
        self.on_lost(i, reason, "the run ends" if given_up else "it is replaced")
        if given_up:
            raise RolloutError(
                f"rollout workers died {self.restarts} times since the last publication; the last error was: worker "
                f"{i}: {reason}. If memory ran out, lower rollout.workers or rollout.prompts_per_shard; if a shard "
                "needs more time, raise rollout.timeout_s"
            )
        self._unreported_restarts += 1
        self.ray.kill(self.workers[i])  # if it only seems lost, it still holds the processor of its successor
        self.workers[i] = self._start()

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        if self.published is None:
            raise RolloutError("the last publication was not confirmed by every worker: publish the weights again")
        version = self.published[2]
        waiting = list(enumerate(shards(prompts, self.prompts_per_shard)))[::-1]
        done: dict[int, list[RolloutGroup]] = {}
        faults: dict[int, str] = {}
        running: dict[Any, tuple[int, int, Sequence[Prompt], float]] = {}
        idle = list(range(len(self.workers)))

        def again(i: int, number: int, shard: Sequence[Prompt], reason: str) -> None:
            self._replace(i, reason)
            self._confirm(i)
            waiting.append((number, shard))

        while waiting or running:
            while waiting and idle:
                number, shard = waiting.pop()
                i = idle.pop(0)
                reference = self.workers[i].sample.remote(list(shard), params, version, self.costs)
                running[reference] = i, number, shard, time.monotonic() + self.timeout_s
            finished = self._wait(list(running))
            late = self._late({reference: deadline for reference, (*_, deadline) in running.items()})
            for reference in [*finished, *late]:
                i, number, shard, _ = running.pop(reference)
                try:
                    if reference in finished:
                        done[number] = self._get(reference)
                        if on_finished:
                            on_finished(len(shard) * params.group_size)
                    else:
                        again(i, number, shard, f"its shard took longer than rollout.timeout_s={self.timeout_s:g}")
                except self.ray.exceptions.RayActorError as error:
                    again(i, number, shard, f"it died: {error}")
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

    def use_costs(self, costs: CostTable | None, rows: int) -> CostTable:
        """One worker measures them alone, with the threads that a worker has."""
        if costs is None:
            before = self.workers[0]
            costs = self._answer(0, "measure_costs", rows)
            if self.workers[0] is not before:
                self._confirm(0)
        self.costs = costs
        return costs

    def metrics(self) -> dict[str, float]:
        restarts, self._unreported_restarts = self._unreported_restarts, 0
        return {"rollout/restarts": float(restarts)}

    def close(self) -> None:
        with suppress(RolloutError):  # if the cluster has died, no worker is left
            self.cluster.check()
            for worker in self.workers:
                self.ray.kill(worker)
        self.workers = []
        self.cluster.close()
