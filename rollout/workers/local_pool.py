"""The pool without workers: one engine in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from policies.lora import has_adapter
from policies.policy import Policy
from rollout.cost_table import CostTable, Workload
from rollout.decoding.engine import Engine
from rollout.faults import OnFinished, RolloutError
from rollout.group import Prompt, RolloutGroup, shards
from rollout.pool import Pool, PoolOptions
from rollout.sampling import SamplingParams
from rollout.weight_sync.checksums import Held


class LocalPool(Pool):
    """One engine in this process, without Ray.

    It reads the weights of a policy that has its precision, no adapters and no shards, and a publication derives anew
    what follows from them. If they have moved since, it refuses to sample (contract 5). It makes a copy of another
    policy, and when other weights are published to it.
    """

    def __init__(self, policy: Policy, options: PoolOptions = PoolOptions()) -> None:  # noqa: B008
        dtype = options.dtype
        split = any(isinstance(parameter, DTensor) for parameter in policy.parameters())
        self.shares = policy.trunk.dtype == dtype and not has_adapter(policy) and not split
        self.engine = Engine(policy if self.shares else policy.merged(), dtype, copies=options.copies)
        self.prompts_per_shard, self.check_stop = options.prompts_per_shard, options.check_stop
        self._synced = self._writes()

    def sync_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        if self.shares:
            state = self.engine.policy.state_dict()
            if any(name in state and state[name].data_ptr() != tensor.data_ptr() for name, tensor in weights.items()):
                self.shares, self.engine.policy = False, self.engine.policy.merged()
        self.engine.sync_weights(weights, version)
        self._synced = self._writes()

    def _writes(self) -> int:
        """Tells how often torch has written to the weights that are shared."""
        shared = self.engine.policy.state_dict(keep_vars=True).values() if self.shares else ()
        return sum(tensor._version for tensor in shared)

    def synced_engine(self) -> Engine:
        """The engine. Raises RolloutError where the policy has learned since the weights that it decodes with."""
        if self._writes() != self._synced:
            raise RolloutError("the policy has learned since its last weight sync: sync its weights first")
        return self.engine

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """Samples shard by shard, see `Pool`."""

        def tell(ended: int) -> None:
            self.check_stop()
            if on_finished:
                on_finished(ended)

        self.check_stop()
        engine = self.synced_engine()
        groups, faults = [], []
        for shard in shards(prompts, self.prompts_per_shard):
            try:
                groups += engine.sample(shard, params, tell)
            except RolloutError as error:
                groups += error.groups
                faults.append(str(error))
        if faults:
            raise RolloutError("\n".join(faults), groups)
        return groups

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        self.check_stop()
        return {"the sampler": self.synced_engine().sample(prompts, params)}

    def held(self) -> dict[str, Held]:
        if self.shares and self.engine.derived:  # it reads the learner's own
            return {}
        return {"the sampler": self.engine.held()}

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        self.check_stop()
        self.engine.costs = costs or self.engine.measure_costs(work)
        return self.engine.costs

    def close(self) -> None:
        self.engine.close()
