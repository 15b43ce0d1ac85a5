"""vLLM as the pool of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from grpo.config.sampling import RolloutOptions
from grpo.run.log import RunLog
from grpo.source.vllm_token import vllm_token
from policies.policy import Policy
from rollout.pool import Pool, PoolOptions
from rollout.vllm.pool import VLLMPool
from rollout.vllm.settings import VLLMSettings
from rollout.workers.kinds import open_pool

NO_KEYED_NOISE = (
    "vLLM draws with seeds of its own: its tokens are not those of our engine, nor the same with other drafts, threads "
    "or batches. The same step of the same run repeats"
)


def open_vllm(policy: Policy, rollout: RolloutOptions, options: PoolOptions, run_log: RunLog) -> Pool:
    """vLLM with the threads of this process. What it is made of is an event."""
    settings = vllm_settings(rollout, run_log.output_dir)
    pool = open_pool(policy, replace(options, threads=torch.get_num_threads(), vllm=settings))
    assert isinstance(pool, VLLMPool)
    more = {"load": pool.state["load"], "merged_adapters": pool.updates.merged}
    run_log.event("vllm", version=pool.state["vllm"], url=pool.client.url, unshown=more)
    run_log.event("keyed_noise", available=False, why=NO_KEYED_NOISE)
    return pool


def vllm_settings(rollout: RolloutOptions, folder: Path) -> VLLMSettings:
    """`folder`: of the run, which gets the log of vLLM."""
    options = rollout.vllm
    return VLLMSettings(
        url=options.url,
        token=vllm_token(options) if options.url else "",
        engine=options.engine,
        draft_tokens=rollout.draft_tokens or 0,
        log=folder / "vllm.log",
    )
