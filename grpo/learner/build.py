"""The learner of each kind of training, from the configuration of its run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from grpo.config.run import SftConfig, TrainConfig
from grpo.learner.learner import Learner
from grpo.learner.optimizer import schedule
from grpo.learner.parallel import ALONE, Ranks
from grpo.learner.teacher import Scores, Teacher
from grpo.run.memory_errors import phase
from policies.policy import Policy

Kind = TypeVar("Kind", bound=Learner)

# Their log-probabilities are the learner's up to rounding in float32 (contract 8).
OWN_BACKENDS = ("native", "transformers")


def sampling_backend(config: TrainConfig, policy: Policy) -> str:
    """The engine that samples: the one that was asked for, or the one that decodes this policy."""
    return config.rollout.backend or policy.backend


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
    teacher: Scores | None = None,
    kind: type[Kind] = Learner,  # type: ignore[assignment]
) -> Kind:
    """Around a policy without adapters. `reload` gives the same one again: a reference where it is sharded."""
    torch.manual_seed(config.seed)  # the first values of adapters and of the value head are drawn
    with phase("loading", config):
        if config.lora:
            policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
        return kind(
            policy,
            config.learner,
            config.mtp,
            config.loss,
            balance=config.balance,
            value=config.value,
            temperature=config.rollout.temperature,
            max_completion_tokens=config.rollout.max_completion_tokens,
            reward_weights=reward_weights,
            sampler_differs=config.dtype != "float32"
            or config.rollout.ahead > 0
            or config.rollout.quantization != "none"
            or sampling_backend(config, policy) not in OWN_BACKENDS,
            schedule=schedule(config.learner.schedule, config.steps, config.learner.warmup_steps),
            ranks=ranks,
            reload=None if ranks.layout is None else reload,
            teacher=Teacher(teacher, config.distill.reward_weight, config.distill.top_k) if teacher else None,
        )
