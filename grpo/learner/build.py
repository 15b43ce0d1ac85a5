"""The learner of GRPO and the terms of its loss, from the configuration of a run."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from grpo.algorithm.own import is_own
from grpo.config.features import FEATURES
from grpo.config.run import TrainConfig
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.optimizer import schedule
from grpo.learner.parallel import ALONE, Ranks
from grpo.learner.prepare import OWN_ESTIMATORS
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.terms.term import Term
from grpo.run.memory_errors import phase
from policies.lora import has_adapter
from policies.policy import Policy

Load = Callable[[str], Policy]

# Their log-probabilities are the learner's up to rounding in float32 (contract 8).
OWN_BACKENDS = ("native", "transformers")


def terms_of(policy: Policy, config: object, load: Load | None = None, *, rollouts: bool = False) -> list[Term]:
    """The terms beside the first that `config` asks for, with `rollouts` those that learn from them too. `load` gives
    the policy of another name, such as a teacher."""
    features = [feature for feature in FEATURES if feature.term and (rollouts or feature.section != "train")]
    modules = [importlib.import_module(f"grpo.learner.terms.{feature.name}") for feature in features]
    terms = [module.term(policy, config, load) for module in modules]
    return [term for term in terms if term is not None]


def check_terms(policy: Policy, config: object) -> None:
    """Raises ValueError where a term cannot be had of this policy, whose weights may be missing."""
    for feature in FEATURES:
        if feature.term:
            check = getattr(importlib.import_module(f"grpo.learner.terms.{feature.name}"), "check", None)
            if check is not None:
                check(policy, config)


def grpo_learner(
    policy: Policy,
    config: TrainConfig,
    reward_weights: Mapping[str, float],
    ranks: Ranks = ALONE,
    reload: Callable[[], Policy] | None = None,
    load: Load | None = None,
    kind: type[Learner] = Learner,
) -> Learner:
    """A learner, or another `kind` of one, around a policy without adapters.

    `reload` gives the same policy again, for a reference where it is sharded and so cannot be copied; `load` gives the
    policy of another name, such as a teacher.
    """
    torch.manual_seed(config.seed)  # the first values of adapters are drawn
    with phase("loading", config):
        if config.lora:
            policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
        return make(
            policy,
            config,
            load=load,
            reward_weights=reward_weights,
            sampler_differs=config.dtype != "float32"
            or config.rollout.ahead > 0
            or config.rollout.quantization != "none"
            or (config.rollout.backend or policy.backend) not in OWN_BACKENDS,
            schedule=schedule(config.learner.schedule, config.steps, config.learner.warmup_steps),
            ranks=ranks,
            reload=None if ranks.layout is None else reload,
            kind=kind,
        )


def make(
    policy: Policy,
    config: TrainConfig,
    *,
    load: Load | None = None,
    sampler_differs: bool | None = None,
    reload: Callable[[], Policy] | None = None,
    kind: type[Learner] = Learner,
    **more: Any,
) -> Learner:
    """A GRPO learner from the sections `learner`, `loss`, `rollout`, `mtp` and those of terms. `sampler_differs` from
    it in precision or backend; None: it does below fp32."""
    loss, options, rollout = config.loss, config.learner, config.rollout
    differs = policy.trunk.dtype != torch.float32 if sampler_differs is None else sampler_differs
    first = PolicyTerm(loss, sampler_differs=differs, longest=rollout.max_completion_tokens)
    terms = [first, *terms_of(policy, config, load, rollouts=True)]
    known = [*OWN_ESTIMATORS, *(name for term in terms for name in term.estimators)]
    if loss.advantage not in known and not is_own(loss.advantage):
        raise ValueError(f"loss.advantage={loss.advantage}: no term of the loss estimates it; use {', '.join(known)}")
    reference = None
    if loss.beta > 0 and not has_adapter(policy.trunk):
        reference = (reload() if reload else copy.deepcopy(policy)).requires_grad_(False)
    likelihood = Likelihood(policy, reference, rollout.temperature, entropy_grad=loss.entropy_coef != 0, watchers=terms)
    return kind(policy, options, terms, likelihood, loss=loss, **more)
