"""The pool of engines: it cuts prompts into shards, publishes weights and replaces lost workers.

Without workers it is one engine in this process. The shards of a step depend on the step alone, and a forward never
mixes two of them, so tokens depend neither on the number of workers, nor on their speed, nor on a retry (contract 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from policies.decoding.quantized import PLAIN, Copies
from policies.lora import has_adapter
from policies.policy import Policy
from rollout.backends.vllm.pool import VLLMPool
from rollout.backends.vllm.settings import VLLMSettings
from rollout.cluster import start_ray as start_ray
from rollout.depth import CostTable, Workload
from rollout.engine import Engine, OnFinished, RolloutError
from rollout.faults import OnLost
from rollout.group import Prompt, RolloutGroup, shards
from rollout.places import PLACEMENT_TIMEOUT_S, Places
from rollout.publication.digests import Held
from rollout.ray_pool import PUBLISH_TIMEOUT_S, TIMEOUT_S, RayPool
from rollout.sampling import SamplingParams
from rollout.workers import OnReady


class Pool(Protocol):
    """A sampler of groups. `sample` returns them in the order of the prompts. If some prompts fail, the others are
    still sampled, and the RolloutError that names the failed ones has the other `groups`."""

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None: ...

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]: ...

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        """The groups of all these prompts by every sampler, under its name: canaries (publication/canaries.py)."""
        ...

    def keep(self) -> None:
        """The learner is about to change the weights that were published, and what is sampled still needs them."""
        ...

    def sleep(self) -> None:
        """Nothing is sampled before the next publication: samplers on the learner's GPUs leave their memory."""
        ...

    def held(self) -> dict[str, Held]:
        """By sampler, the digests of the tensors that it holds; empty where `publish` has compared them already."""
        ...

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        """Sets the table that every depth controller uses; without `costs` it is measured for this work."""
        ...

    def metrics(self) -> dict[str, float]:
        """faults/* and publish/* since the last call; empty without workers."""
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
    publish_timeout_s: float = PUBLISH_TIMEOUT_S,
    gpus: float = 1.0,
    placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
    colocate: bool | None = None,
    while_waiting: Callable[[], None] = lambda: None,
    on_lost: OnLost = lambda what, reason, action: None,
    on_ready: OnReady = lambda worker, where: None,
    vllm: VLLMSettings | None = None,
    copies: Copies = PLAIN,
) -> Pool:
    """A pool to which the weights of `policy` are published.

    Without workers it reads the weights of `policy` itself where it can, see LocalPool.

    The other arguments are for Ray workers. A worker that takes longer than `timeout_s` for a shard, or than
    `publish_timeout_s` to take new weights over, is replaced, as if it had died. `while_waiting` is called
    several times a second while the pool waits for workers; an exception that it raises ends the wait. `on_lost` gets
    what died or was late, such as "worker 1", the reason, and what is done.

    Each worker has `threads` processors and, where the cluster has GPUs, `gpus` of one; `placement_timeout_s` is how
    long the pool waits for room. With `colocate` workers and learner take turns on the same GPUs; None: where there are
    no others. `on_ready` gets the number of each worker that has started, and where it is.

    `copies`: the matrices that samplers decode with may have fewer bits, and are made anew by each publication.

    With `vllm` a server of vLLM samples in their place, with `threads`; `while_waiting` and `on_lost` are as above.
    """
    if vllm is not None:
        return VLLMPool(policy, vllm, dtype, threads, while_waiting, on_lost)
    if workers == 0:
        return LocalPool(policy, dtype, prompts_per_shard, copies)
    return RayPool(
        policy,
        Places(workers, threads, gpus, placement_timeout_s, colocate),
        dtype,
        prompts_per_shard,
        address,
        (timeout_s, publish_timeout_s),
        while_waiting,
        on_lost,
        on_ready,
        copies,
    )


class LocalPool:
    """One engine in this process, without Ray.

    It has no copy of a policy that has its own precision, no adapters and no shards: it reads that policy's weights,
    and a publication derives anew what follows from them. If they have moved since, it refuses to sample (contract 5).
    When other weights are published to it, it makes a copy.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype, prompts_per_shard: int, copies: Copies = PLAIN) -> None:
        split = any(isinstance(parameter, DTensor) for parameter in policy.parameters())
        self.shares = policy.trunk.dtype == dtype and not has_adapter(policy) and not split
        self.engine = Engine(policy if self.shares else policy.merged(), dtype, copies=copies)
        self.prompts_per_shard = prompts_per_shard
        self._published = self._writes()

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        if self.shares:
            own = self.engine.policy.state_dict()
            if any(name in own and own[name].data_ptr() != tensor.data_ptr() for name, tensor in weights.items()):
                self.shares, self.engine.policy = False, self.engine.policy.merged()
        self.engine.publish(weights, version)
        self._published = self._writes()

    def _writes(self) -> int:
        """How often torch has written to the weights that are shared."""
        shared = self.engine.policy.state_dict(keep_vars=True).values() if self.shares else ()
        return sum(tensor._version for tensor in shared)

    def published(self) -> Engine:
        """The engine. Raises RolloutError where the policy has learned since the weights that it decodes with."""
        if self._writes() != self._published:
            raise RolloutError("the policy has learned since its last publication: publish its weights first")
        return self.engine

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        engine = self.published()
        groups, faults = [], []
        for shard in shards(prompts, self.prompts_per_shard):
            try:
                groups += engine.sample(shard, params, on_finished)
            except RolloutError as error:
                groups += error.groups
                faults.append(str(error))
        if faults:
            raise RolloutError("\n".join(faults), groups)
        return groups

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        return {"the sampler": self.published().sample(prompts, params)}

    def keep(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def held(self) -> dict[str, Held]:
        if self.shares and self.engine.derived:  # it reads the learner's own
            return {}
        return {"the sampler": self.engine.held()}

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        self.engine.costs = costs or self.engine.measure_costs(work)
        return self.engine.costs

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.engine.close()
