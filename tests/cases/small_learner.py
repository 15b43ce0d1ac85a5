"""A GRPO learner from the options that a test cares about."""

from __future__ import annotations

from typing import Any

from grpo.config.learner import BalanceOptions, LearnerOptions, MTPOptions
from grpo.config.loss import DistillOptions, LossOptions, ValueOptions
from grpo.learner.build import Setting, make
from grpo.learner.learner import Learner
from policies.policy import Policy


def small_learner(
    policy: Policy,
    options: LearnerOptions | None = None,
    mtp: MTPOptions | None = None,
    loss: LossOptions | None = None,
    *,
    balance: BalanceOptions | None = None,
    value: ValueOptions | None = None,
    teacher: Policy | None = None,
    reward_weight: float = 0.0,
    top_k: int | None = None,
    max_completion_tokens: int = 0,
    **more: Any,
) -> Learner:
    """See `grpo.learner.build.make` for `more`. A `teacher` has `reward_weight` and `top_k` of `distill`."""
    distill = DistillOptions(teacher="teacher" if teacher else None, reward_weight=reward_weight, top_k=top_k)
    setting = Setting(
        loss or LossOptions(),
        mtp or MTPOptions(),
        balance or BalanceOptions(),
        value or ValueOptions(),
        distill,
        load=lambda name: teacher,
    )
    return make(policy, options or LearnerOptions(), setting, longest=max_completion_tokens, **more)
