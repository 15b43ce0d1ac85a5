"""The learner of each kind of training, from the configuration of its run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo.config.run import SftConfig, TrainConfig
from grpo.learner.learner import Learner
from grpo.learner.optimizer import schedule
from grpo.learner.parallel import ALONE, Ranks
from grpo.run.memory_errors import phase
from policies.policy import Policy


def sft_learner(policy: Policy, config: SftConfig, ranks: Ranks = ALONE) -> Learner:
    """Adapters are not used here even where GRPO will: LoRA starts from the warm policy."""
    options = config.warm_start
    with phase("loading", config):
        return Learner(
            policy,
            config.learner,
            config.mtp,
            balance=config.balance,
            learning_rate=options.learning_rate,
            schedule=schedule(options.schedule, options.steps, options.warmup_steps),
            ranks=ranks,
        )


def grpo_learner(
    policy: Policy,
    config: TrainConfig,
    reward_weights: dict[str, float],
    ranks: Ranks = ALONE,
    reload: Callable[[], Policy] | None = None,
) -> Learner:
    """Around a policy without adapters. `reload` gives the same one again: a reference where it is sharded."""
    torch.manual_seed(config.seed)  # the first values of adapters and of the value head are drawn
    with phase("loading", config):
        if config.lora:
            policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
        return Learner(
            policy,
            config.learner,
            config.mtp,
            config.loss,
            balance=config.balance,
            value=config.value,
            temperature=config.rollout.temperature,
            max_completion_tokens=config.rollout.max_completion_tokens,
            reward_weights=reward_weights,
            schedule=schedule(config.learner.schedule, config.steps, config.learner.warmup_steps),
            sampler_differs=True if config.rollout.backend == "vllm" else None,
            ranks=ranks,
            reload=None if ranks.layout is None else reload,
        )
