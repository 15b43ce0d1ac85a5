"""What every sampler can do, and what one is opened with. `rollout.workers.kinds` opens them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rollout.cost_table import CostTable, Workload
from rollout.faults import OnFinished, OnLost
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import PLAIN, Copies, SamplingParams
from rollout.weight_sync.checksums import Held

TIMEOUT_S = 3600.0  # of a shard: far above any that was measured, so that only a worker that hangs is killed
SYNC_TIMEOUT_S = 600.0  # of new weights
PLACEMENT_TIMEOUT_S = 300.0  # of room in the cluster
OnReady = Callable[[int, dict[str, Any]], None]  # gets the number of a worker that has started, and where it is


class Sampler(Protocol):
    """Who samples groups: a pool, the agents of a run, or a server that is evaluated."""

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """Samples one group per prompt, in their order. If some prompts fail, the others are still sampled, and the
        RolloutError that names the failed ones has the other `groups`."""
        ...

    def keep_weights(self) -> None:
        """Is told that the learner is about to change the published weights, which what is sampled still needs."""


class Pool(Sampler, Protocol):
    """A sampler to which weights are published."""

    asleep: bool = False  # samplers have left the learner's GPUs, until the next publication

    def sync_weights(self, weights: Mapping[str, Tensor], version: int) -> None: ...

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        """The groups of all these prompts by every engine, under its name: canaries (weight_sync/sync_check.py)."""
        ...

    def sleep(self) -> None:
        """Is told that nothing is sampled before the next publication: samplers on the learner's GPUs leave their
        memory."""

    def held(self) -> dict[str, Held]:
        """The digests of the tensors that each sampler holds, by its name; empty where `publish` has compared them
        already."""
        return {}

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        """Sets the table that every depth controller uses; without `costs` it is measured for this work."""
        ...

    def metrics(self) -> dict[str, float]:
        """faults/* and sync/* since the last call; empty without workers."""
        return {}

    def close(self) -> None: ...


@dataclass(frozen=True)
class PoolOptions:
    """What a pool is opened with: each kind of pool reads what concerns it.

    `dtype` is the precision of sampling. At most `prompts_per_shard` prompts are decoded together; vLLM batches by
    itself. By `copies` the matrices of samplers have fewer bits. `check_stop` is called before sampling, as completions
    end, and several times a second while workers or a server are waited for; what it raises ends what the pool does.

    With `workers` Ray's actors sample, each with `threads` processors and, where the cluster has GPUs, `gpus` of one.
    The pool waits `placement_timeout_s` for room in the cluster at `address`. A worker that takes longer than
    `timeout_s` for a shard, or `sync_timeout_s` to take new weights over, is replaced, as if it had died. With
    `colocate` workers and learner take turns on the same GPUs; None: where there are no others. `on_lost` gets what
    died or was late, such as "worker 1", the reason, and what is done; `on_ready` gets the number of each worker that
    has started, and where it is. With `vllm`, its VLLMSettings, a server of vLLM samples in their place.
    """

    workers: int = 0
    dtype: torch.dtype = torch.float32
    threads: int = 1
    prompts_per_shard: int = 8
    address: str | None = None
    timeout_s: float = TIMEOUT_S
    sync_timeout_s: float = SYNC_TIMEOUT_S
    gpus: float = 1.0
    placement_timeout_s: float = PLACEMENT_TIMEOUT_S
    colocate: bool | None = None
    copies: Copies = PLAIN
    check_stop: Callable[[], None] = lambda: None
    on_lost: OnLost = lambda what, reason, action: None
    on_ready: OnReady = lambda worker, where: None
    vllm: object | None = None

    @property
    def kind(self) -> str:
        """The name of the pool in the table of `rollout.workers.kinds`."""
        if self.vllm is not None:
            return "vllm"
        return "ray" if self.workers else "local"
