"""The kinds of pools by name, each in a file that is loaded when it is asked for.

A pool cuts prompts into shards, publishes weights and replaces lost workers. The shards of a step depend on the step
alone, and a forward never mixes two of them, so tokens depend neither on the number of workers, nor on their speed, nor
on a retry (contract 4).
"""

from __future__ import annotations

from importlib import import_module

from policies.policy import Policy
from rollout.pool import Pool
from rollout.pool import PoolOptions as PoolOptions

POOLS = {
    "local": "rollout.workers.local_pool:LocalPool",
    "ray": "rollout.workers.ray_pool:RayPool",
    "vllm": "rollout.vllm.pool:VLLMPool",
}


def open_pool(policy: Policy, options: PoolOptions = PoolOptions()) -> Pool:  # noqa: B008
    """A pool that samples with the weights of `policy`, and with those that are published to it later."""
    module, _, name = POOLS[options.kind].partition(":")
    pool: Pool = getattr(import_module(module), name)(policy, options)
    return pool
