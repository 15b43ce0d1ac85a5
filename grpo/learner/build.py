"""The learner of each kind of training, from the configuration of its run."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from grpo.algorithm.own import is_own
from grpo.config.learner import BalanceOptions, LearnerOptions, MTPOptions
from grpo.config.loss import DistillOptions, LossOptions, ValueOptions
from grpo.config.run import SftConfig, TrainConfig
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.optimizer import schedule
from grpo.learner.parallel import ALONE, Ranks
from grpo.learner.prepare import OWN_ESTIMATORS
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.terms.supervised import SupervisedTerm
from grpo.learner.terms.term import Term
from grpo.run.memory_errors import phase
from policies.lora import has_adapter
from policies.policy import Policy

# Their log-probabilities are the learner's up to rounding in float32 (contract 8).
OWN_BACKENDS = ("native", "transformers")

# The terms that a run may have beside its first, the policy loss or that of supervised steps, as they add up. Each is a
# file of grpo/learner/terms, whose `term(policy, setting)` gives it, or None where nobody asks for it.
TERMS = (
    "distill",
    "balance",
    "value",
    "draft_head",
)


@dataclass(frozen=True)
class Setting:
    """What terms are made from: their options, and what loads a policy by name."""

    loss: LossOptions = field(default_factory=LossOptions)
    mtp: MTPOptions = field(default_factory=MTPOptions)
    balance: BalanceOptions = field(default_factory=BalanceOptions)
    value: ValueOptions = field(default_factory=ValueOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    load: Callable[[str], Policy] | None = None


def terms_of(policy: Policy, setting: Setting) -> list[Term]:
    """The terms beside the first. Raises ValueError for `loss.advantage` that no term here brings."""
    terms = [importlib.import_module(f"grpo.learner.terms.{name}").term(policy, setting) for name in TERMS]
    terms = [term for term in terms if term is not None]
    brought = [*OWN_ESTIMATORS, *(name for term in terms for name in term.estimators)]
    if setting.loss.advantage not in brought and not is_own(setting.loss.advantage):
        raise ValueError(
            f"loss.advantage={setting.loss.advantage}: no term of the loss estimates it; use {', '.join(brought)}"
        )
    return terms


def sampling_backend(config: TrainConfig, policy: Policy) -> str:
    """The engine that samples: the one that was asked for, or the one that decodes this policy."""
    return config.rollout.backend or policy.backend


def sft_learner(policy: Policy, config: SftConfig, ranks: Ranks = ALONE) -> Learner:
    """Adapters are not used here even where GRPO will: LoRA starts from the warm policy."""
    options = config.warm_start
    with phase("loading", config):
        terms = [SupervisedTerm(), *terms_of(policy, Setting(mtp=config.mtp, balance=config.balance))]
        return Learner(
            policy,
            config.learner.model_copy(update={"updates_per_batch": 1}),  # that is of rollouts
            terms,
            Likelihood(policy, watchers=terms),
            learning_rate=options.learning_rate,
            schedule=schedule(options.schedule, options.steps, options.warmup_steps),
            ranks=ranks,
        )


def grpo_learner(
    policy: Policy,
    config: TrainConfig,
    reward_weights: Mapping[str, float],
    ranks: Ranks = ALONE,
    reload: Callable[[], Policy] | None = None,
    load: Callable[[str], Policy] | None = None,
    kind: Callable[..., Any] = Learner,
) -> Any:
    """A learner, or another `kind` of one, around a policy without adapters.

    `reload` gives the same policy again, for a reference where it is sharded and so cannot be copied; `load` gives the
    policy of another name, such as a teacher.
    """
    torch.manual_seed(config.seed)  # the first values of adapters are drawn
    with phase("loading", config):
        if config.lora:
            policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
        setting = Setting(config.loss, config.mtp, config.balance, config.value, config.distill, load)
        return make(
            policy,
            config.learner,
            setting,
            temperature=config.rollout.temperature,
            longest=config.rollout.max_completion_tokens,
            reward_weights=reward_weights,
            sampler_differs=config.dtype != "float32"
            or config.rollout.ahead > 0
            or config.rollout.quantization != "none"
            or sampling_backend(config, policy) not in OWN_BACKENDS,
            schedule=schedule(config.learner.schedule, config.steps, config.learner.warmup_steps),
            ranks=ranks,
            reload=None if ranks.layout is None else reload,
            kind=kind,
        )


def make(
    policy: Policy,
    options: LearnerOptions,
    setting: Setting,
    *,
    temperature: float = 1.0,
    longest: int = 0,
    sampler_differs: bool | None = None,
    reload: Callable[[], Policy] | None = None,
    kind: Callable[..., Any] = Learner,
    **more: Any,
) -> Any:
    """A GRPO learner from its options. `longest` is the length limit of completions. `sampler_differs` from it in
    precision or backend; None: it does below fp32."""
    loss = setting.loss
    differs = policy.trunk.dtype != torch.float32 if sampler_differs is None else sampler_differs
    first = PolicyTerm(loss, updates=options.updates_per_batch, sampler_differs=differs, longest=longest or None)
    terms = [first, *terms_of(policy, setting)]
    reference = None
    if loss.beta > 0 and not has_adapter(policy.trunk):
        reference = (reload() if reload else copy.deepcopy(policy)).requires_grad_(False)
    likelihood = Likelihood(policy, reference, temperature, entropy_grad=loss.entropy_coef != 0, watchers=terms)
    return kind(policy, options, terms, likelihood, loss=loss, **more)
