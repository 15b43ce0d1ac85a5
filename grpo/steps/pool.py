"""The pool of a run, and the table of draft costs in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from grpo.config.sampling import RolloutOptions
from grpo.run.log import RunLog
from grpo.run.memory_errors import phase
from grpo.run.stop import Stopped, signals
from grpo.source.vllm_token import vllm_token
from policies.decoding.quantized import Copies
from policies.policy import Policy
from policies.publication import Publication
from policies.sharding import everyone, whole
from rollout.backends.vllm.pool import VLLMPool
from rollout.backends.vllm.settings import VLLMSettings
from rollout.depth import PROMPT_TOKENS, CostTable, Workload
from rollout.group import Prompt, RolloutGroup
from rollout.places import here
from rollout.pool import OnFinished, Pool, open_pool
from rollout.publication.digests import Held
from rollout.sampling import SamplingParams

NO_KEYED_NOISE = (
    "vLLM draws with seeds of its own: its tokens are not those of our engine, nor the same with other drafts, threads "
    "or batches. The same step of the same run repeats"
)
Reads = Callable[[Publication, Publication | None], Iterator[Tensor]]


class NoPool:
    """The pool of a rank that does not sample: it takes part in publications.

    `reads`: what the pool of rank 0 reads of a publication after another one; without it the merged weights. `in_turn`:
    samplers use this GPU after each publication.
    """

    def __init__(self, reads: Reads | None, in_turn: bool = False) -> None:
        self.reads, self.in_turn, self._last = reads, in_turn, Publication({})

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        if self.reads:
            last, self._last = self._last, Publication.of(weights)
        for tensor in self.reads(self._last, last) if self.reads else weights.values():
            whole(tensor)  # every rank gathers it when rank 0 does
        if self.in_turn and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def keep(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def sample(self, *_: object) -> list[RolloutGroup]:
        raise RuntimeError("rank 0 alone samples")

    def sample_on_each(self, *_: object) -> dict[str, list[RolloutGroup]]:
        raise RuntimeError("rank 0 alone samples")

    def held(self) -> dict[str, Held]:
        return {}

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        raise RuntimeError("rank 0 alone samples")

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class InterruptiblePool:
    """A pool whose sampling is given up once a stop was asked for. A publication that a stop cuts short raises nothing:
    what was learned counts, and the next sampling is given up."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        with suppress(Stopped):
            self.pool.publish(weights, version)

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        def forward(ended: int) -> None:
            signals.check()
            if on_finished:
                on_finished(ended)

        signals.check()
        return self.pool.sample(prompts, params, forward)

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        """Nothing once a stop was asked for, since a publication may have been cut short."""
        try:
            signals.check()
            return self.pool.sample_on_each(prompts, params)
        except Stopped:
            return {}

    def keep(self) -> None:
        self.pool.keep()

    def sleep(self) -> None:
        self.pool.sleep()

    def held(self) -> dict[str, Held]:
        return self.pool.held()

    def use_costs(self, costs: CostTable | None, work: Workload) -> CostTable:
        signals.check()
        return self.pool.use_costs(costs, work)

    def metrics(self) -> dict[str, float]:
        return self.pool.metrics()

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_run_pool(
    policy: Policy, rollout: RolloutOptions, dtype: str, run_log: RunLog, *, samples: bool = True
) -> InterruptiblePool:
    """Workers as `rollout` asks for them. A stop that is asked for interrupts their work, what is lost is an
    event. Raises Stopped where a stop was asked for before they were ready."""

    def on_lost(what: str, reason: str, action: str) -> None:
        run_log.event("lost", what=what, action=action, reason=reason)

    def on_ready(worker: int, where: dict[str, Any]) -> None:
        run_log.event("worker", worker=worker, **where)

    ranks = everyone(here()) if rollout.samplers else []
    if not samples:
        own = Publication.read_parts if rollout.samplers else None
        others = NoPool(Publication.parts if rollout.backend == "vllm" else own, in_turn=rollout.colocate)
        others.publish(policy.publication(), 0)
        return InterruptiblePool(others)
    options = SimpleNamespace(rollout=rollout, dtype=dtype)
    with phase("loading", options):
        pool = open_pool(
            policy,
            rollout.samplers,
            dtype=getattr(torch, dtype),
            threads=torch.get_num_threads() if rollout.backend == "vllm" else rollout.threads_per_worker,
            prompts_per_shard=rollout.prompts_per_shard,
            timeout_s=rollout.timeout_s,
            publish_timeout_s=rollout.publish_timeout_s,
            while_waiting=signals.check,
            gpus=rollout.gpus_per_worker,
            placement_timeout_s=rollout.placement_timeout_s,
            colocate=False if rollout.ahead else rollout.colocate or None,
            on_lost=on_lost,
            on_ready=on_ready,
            vllm=vllm_settings(rollout, run_log.output_dir) if rollout.backend == "vllm" else None,
            copies=Copies(*rollout.copies),
        )
    for rank, where in enumerate([here(), *ranks[1:]] if ranks else []):  # rank 0 may know its node only now
        run_log.event("learner", rank=rank, **where)
    if isinstance(pool, VLLMPool):
        more = {"load": pool.state["load"], "merged_adapters": pool.updates.merged}
        run_log.event("vllm", version=pool.state["vllm"], url=pool.client.url, unshown=more)
        run_log.event("keyed_noise", available=False, why=NO_KEYED_NOISE)
    return InterruptiblePool(pool)


def use_costs_of_run(
    pool: Pool,
    policy: Policy,
    rollout: RolloutOptions,
    folder: Path,
    sampling: SamplingParams,
    longest_prompt: int = PROMPT_TOKENS,
    *,
    resumes: bool,
) -> None:
    """Where a controller chooses the depth: the table that was saved, or a new one, measured once and saved."""
    if rollout.draft_tokens is not None or policy.mtp is None or rollout.backend == "vllm":
        return
    path = folder / "draft_costs.json"
    work = Workload.of(sampling, rollout.prompts_per_shard * rollout.group_size, longest_prompt)
    saved = CostTable.load(path) if resumes and path.exists() else None
    if saved is not None and work.graphs and saved.graphs is None:
        saved = None  # of a run that had no graphs
    costs = pool.use_costs(saved, work)
    if saved is None:
        costs.save(path)


def vllm_settings(rollout: RolloutOptions, folder: Path) -> VLLMSettings:
    """`folder`: of the run, which gets the log of vLLM."""
    options = rollout.vllm
    return VLLMSettings(
        url=options.url,
        token=vllm_token(options) if options.url else "",
        python=options.python,
        engine=options.engine,
        draft_tokens=rollout.draft_tokens or 0,
        log=folder / "vllm.log",
        silence_s=options.silence_s,
        publish_s=rollout.publish_timeout_s,
    )
