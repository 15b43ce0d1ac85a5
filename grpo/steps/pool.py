"""The pool of a run, and the table of draft costs in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from grpo.config.run import TrainConfig
from grpo.config.sampling import RolloutOptions
from grpo.run.memory_errors import phase
from grpo.run.stop import signals
from grpo.steps.loop import Run
from grpo.task.sampling import sampling_params
from grpo.task.task import Task
from policies.devices import empty_cache
from policies.policy import Policy
from policies.publication import Publication
from policies.routing.routers import has_routers
from policies.sharding import everyone, whole
from rollout.cost_table import FEW_ROWS, MOST_ROWS, PROMPT_TOKENS, CostTable, Workload
from rollout.pool import PUBLISH_TIMEOUT_S, TIMEOUT_S, Pool, PoolOptions, Sampler
from rollout.publication.digests import Held
from rollout.sampling import Copies, SamplingParams
from rollout.workers.kinds import open_pool

PROMPTS_READ = 256  # whose lengths say how long sequences become

Reads = Callable[[Publication, Publication | None], Iterator[Tensor]]


class NoPool:
    """The pool of a rank that does not sample: it takes part in publications. That of a session that only supervises.

    `reads`: what the pool of rank 0 reads of a publication after another one; without it the merged weights. `in_turn`:
    samplers use this GPU after each publication.
    """

    asleep = False

    def __init__(self, reads: Reads | None = None, in_turn: bool = False) -> None:
        self.reads, self.in_turn, self._last = reads, in_turn, Publication({})

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        if self.reads:
            last, self._last = self._last, Publication.of(weights)
        for tensor in self.reads(self._last, last) if self.reads else weights.values():
            whole(tensor)  # every rank gathers it when rank 0 does
        if self.in_turn:
            empty_cache()

    def keep_weights(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def sample(self, *_: object) -> NoReturn:
        raise RuntimeError("rank 0 alone samples, and a session of quartet sft only to evaluate")

    sample_on_each = sample

    def held(self) -> dict[str, Held]:
        return {}

    def use_costs(self, costs: CostTable | None, work: Workload) -> NoReturn:
        self.sample()

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def sampling_of(run: Run[Any], policy: Policy, group_size: int, *, rounds: int = 0) -> SamplingParams:
    """The run's way to sample groups of this size; see `sampling_params`."""
    config = run.config
    return sampling_params(policy, config.rollout, group_size, config.seed, rounds=rounds)


def sampling_of_steps(run: Run[TrainConfig], task: Task, policy: Policy) -> SamplingParams:
    """Tells how the steps of a run of GRPO sample."""
    config, options, shard, rounds = run.config, run.config.rollout, run.config.rollout.prompts_per_shard, 0
    replays = config.learner.routing_replay  # which experts were chosen no graph records
    if not replays and shard * options.group_size <= (FEW_ROWS if has_routers(policy.trunk) else MOST_ROWS):
        rounds = config.steps * -(-config.prompts_per_step // shard) * options.max_completion_tokens
    sampling = sampling_of(run, policy, options.group_size, rounds=rounds)
    if sampling.compiled:
        run.log.event("graphs", planned_rounds=rounds)
    return replace(sampling, record_routing=replays, environment=task.actor.environment)


def open_run_pool(run: Run[Any], policy: Policy, **changes: object) -> Pool:
    """The pool that `rollout` asks for, with `changes`; on a rank that does not sample the part that it takes in
    publications. A stop that is asked for interrupts its work, what is lost is an event. Raises Stopped where a stop
    was asked for before it was ready."""
    rollout, dtype, run_log = run.config.whole_rollout.model_copy(update=changes), run.config.dtype, run.log
    if not run.ranks.first:
        _places(rollout)
        reads: Reads | None = Publication.read_parts if rollout.samplers else None
        if rollout.backend == "vllm":
            reads = Publication.parts
        part = NoPool(reads, in_turn=_on_this_gpu(rollout, policy))
        part.publish(policy.publication(), 0)
        return part

    def on_lost(what: str, reason: str, action: str) -> None:
        run_log.event("lost", what=what, action=action, reason=reason)

    def on_ready(worker: int, where: dict[str, Any]) -> None:
        run_log.event("worker", worker=worker, **where)

    options = PoolOptions(
        workers=rollout.samplers,
        dtype=getattr(torch, dtype),
        prompts_per_shard=rollout.prompts_per_shard,
        timeout_s=TIMEOUT_S,
        publish_timeout_s=PUBLISH_TIMEOUT_S,
        gpus=0.0 if run.config.device == "cpu" else 1.0,
        colocate=False if rollout.ahead else None,
        copies=Copies(rollout.quantization, rollout.quantization),
        check_stop=signals.check,
        on_lost=on_lost,
        on_ready=on_ready,
    )
    ranks = _places(rollout)
    with phase("loading", SimpleNamespace(rollout=rollout, dtype=dtype)):
        if rollout.backend == "vllm":
            from grpo.steps.vllm import open_vllm

            pool = open_vllm(policy, rollout, options, run_log)
        else:
            pool = open_pool(policy, options)
    if ranks:
        from rollout.places import here

        ranks[0] = here()  # it may know its node only now
    for rank, where in enumerate(ranks):
        run_log.event("learner", rank=rank, **where)
    return pool


def _on_this_gpu(rollout: RolloutOptions, policy: Policy) -> bool:
    """Whether workers or vLLM use the GPU of this rank while it does not learn: where there are no other GPUs."""
    if rollout.ahead or rollout.vllm.url or not (rollout.samplers or rollout.backend == "vllm"):
        return False
    from rollout.places import Places

    return Places(1, 1, 1.0, 0.0).taken(policy)[0]


def _places(rollout: RolloutOptions) -> list[dict[str, Any]]:
    """Asks where every rank is; gives nothing where no worker or server samples. Every rank takes part."""
    if not rollout.samplers:
        return []
    from rollout.places import here

    return everyone(here())


def open_sampler(run: Run[TrainConfig], task: Task, pool: Pool) -> AbstractContextManager[Sampler]:
    """Opens what samples for a run: `pool`, or the episodes of its agent, which `pool` samples in this process."""
    agent = task.actor.agent
    if agent is None or not run.ranks.first:
        return nullcontext(pool)
    from grpo.endpoint.agent_sampler import AgentSampler

    return closing(AgentSampler(pool, agent, run.config.rollout.temperature))


def use_costs_of_run(run: Run[Any], task: Task, pool: Pool, policy: Policy, sampling: SamplingParams) -> None:
    """Gives the pool its table of costs where a controller chooses the depth: the saved one, or one measured now."""
    rollout = run.config.whole_rollout
    if rollout.draft_tokens is not None or policy.mtp is None or rollout.backend == "vllm":
        return
    path = run.folder / "draft_costs.json"
    longest = PROMPT_TOKENS
    if sampling.compiled:  # graphs have as much room as the first prompts tell
        prompts = [task.prompt(example, policy.tokenizer) for example in task.train[:PROMPTS_READ]]
        longest = max(len(prompt.token_ids) for prompt in prompts)
    work = Workload.of(sampling, rollout.prompts_per_shard * rollout.group_size, longest)
    saved = CostTable.load(path) if run.resumes and path.exists() else None
    if saved is not None and work.graphs and saved.graphs is None:
        saved = None  # of a run that had no graphs
    costs = pool.use_costs(saved, work)
    if saved is None:
        costs.save(path)
