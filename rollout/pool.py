"""The pool of engines: shards, dispatch, weight publication, lost workers. Without workers it is one engine in process.

A step's prompts are cut into shards that depend on the step alone. One forward never mixes shards, so tokens do not
depend on the number of workers, on who is faster, or on a retry (contract 4).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from policies.policy import Policy, digest
from rollout.draft_depth import CostTable
from rollout.engine import Engine, RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams
from rollout.worker import PackedWeights, Worker, pack

MAX_RESTARTS = 3  # of all workers together, between two publications

OnFinished = Callable[[int], None]


class Pool(Protocol):
    """What samples. `sample` returns groups in the order of the prompts, whoever sampled them. A prompt that fails
    costs no other one: the RolloutError that names it has the other `groups`."""

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None: ...

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]: ...

    def use_costs(self, costs: CostTable | None, rows: int) -> CostTable:
        """The table that every depth controller goes by, measured at up to `rows` live rows where there is none yet."""
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
) -> Pool:
    """A pool with the weights of `policy` published to it; it never shares memory with `policy` itself."""
    if workers == 0:
        return LocalPool(policy, dtype, prompts_per_shard)
    return RayPool(policy, workers, dtype, threads, prompts_per_shard, address)


def shards(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


class LocalPool:
    """One engine in this process, without Ray."""

    def __init__(self, policy: Policy, dtype: torch.dtype, prompts_per_shard: int) -> None:
        copy = Policy.from_skeleton(policy.skeleton(), next(policy.parameters()).dtype).to(policy.device)
        copy.load_weights(policy.weights())
        self.engine, self.prompts_per_shard = Engine(copy, dtype), prompts_per_shard

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.engine.publish(weights, version)

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
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

    def close(self) -> None:
        pass


class RayPool:
    """Ray actors with an engine each. A worker that dies is replaced, and its shard sampled again: the same tokens."""

    def __init__(
        self,
        policy: Policy,
        workers: int,
        dtype: torch.dtype,
        threads: int,
        prompts_per_shard: int,
        address: str | None,
    ) -> None:
        import ray

        self.ray = ray
        self.prompts_per_shard, self.threads = prompts_per_shard, threads
        self.owns_cluster = not ray.is_initialized()
        if self.owns_cluster:
            start_ray(workers * threads, address)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        held = next(policy.parameters()).dtype
        precisions = (str(kind).removeprefix("torch.") for kind in (held, dtype))
        self.arguments = (policy.skeleton(), *precisions, self.device, threads)
        self.published: tuple[Any, str, int] | None = None
        self.costs: CostTable | None = None
        self.restarts = 0
        self.workers = [self._start() for _ in range(workers)]
        self.publish(policy.weights(), 0)

    def _start(self) -> Any:
        limits = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        actor = self.ray.remote(Worker).options(
            num_cpus=self.threads,
            num_gpus=1 if self.device == "cuda" else 0,
            runtime_env={"env_vars": limits | {"TOKENIZERS_PARALLELISM": "false"}},
        )
        return actor.remote(*self.arguments)

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Every worker confirms the digest of what it holds before anybody samples with it (contract 5)."""
        packed: PackedWeights = pack(weights)
        self.published = self.ray.put(packed), digest(weights), version
        self.restarts = 0
        for i in range(len(self.workers)):
            self._confirm(i)

    def _confirm(self, i: int) -> None:
        assert self.published is not None
        reference, expected, version = self.published
        while True:
            try:
                got = self.ray.get(self.workers[i].publish.remote(reference, version))
                break
            except self.ray.exceptions.RayActorError as error:
                self._replace(i, error)
        if got != expected:
            self.published = None
            raise RolloutError(f"worker {i} holds weights {got}, published were {expected} (version {version})")

    def _replace(self, i: int, error: Exception) -> None:
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise RolloutError(
                f"rollout workers died {self.restarts} times since the last publication; the last error was: {error}. "
                "If memory ran out, lower rollout.workers or rollout.prompts_per_shard"
            ) from error
        self.ray.kill(self.workers[i])  # if only out of sight, it still holds the processor that its successor needs
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
        running: dict[Any, tuple[int, int, Sequence[Prompt]]] = {}
        idle = list(range(len(self.workers)))
        while waiting or running:
            while waiting and idle:
                number, shard = waiting.pop()
                i = idle.pop(0)
                running[self.workers[i].sample.remote(list(shard), params, version, self.costs)] = (i, number, shard)
            finished, _ = self.ray.wait(list(running), num_returns=1)
            i, number, shard = running.pop(finished[0])
            try:
                done[number] = self.ray.get(finished[0])
                if on_finished:
                    on_finished(len(shard) * params.group_size)
            except self.ray.exceptions.RayActorError as error:
                self._replace(i, error)
                self._confirm(i)
                waiting.append((number, shard))
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
        """Measured by one worker alone, with the threads that a worker has."""
        self.costs = costs or self.ray.get(self.workers[0].measure_costs.remote(rows))
        return self.costs

    def close(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.workers = []
        if self.owns_cluster:
            self.ray.shutdown()


def start_ray(cpus: int, address: str | None = None) -> None:
    """A cluster of our own on loopback, without dashboard and usage reports; or an existing one by address."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
        return
    # Ray takes 127.0.0.1 for "find my address" and then listens on every interface, except where it does not support
    # clusters at all, as on Windows: there every process of it is bound to loopback.
    constants = ray._private.ray_constants
    clusters, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=True,
            configure_logging=True,
        )
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
