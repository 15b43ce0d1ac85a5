"""Learners from the options that a test cares about, and what is in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from grpo.config.balance import BalanceOptions
from grpo.config.distill import DistillOptions
from grpo.config.learner import LearnerOptions, MTPOptions, SftMTPOptions
from grpo.config.loss import LossOptions
from grpo.config.value import ValueOptions
from grpo.learner.build import make, terms_of
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.terms.supervised import SupervisedTerm
from grpo.learner.terms.term import Work
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
    top_k: int | None = None,
    temperature: float = 1.0,
    max_completion_tokens: int = 9,
    **more: Any,
) -> Learner:
    """For GRPO. See `grpo.learner.build.make` for `more`. A `teacher` has `top_k` of `distill`."""
    distill = DistillOptions(teacher="teacher" if teacher else None, top_k=top_k)
    config = SimpleNamespace(
        learner=options or LearnerOptions(),
        loss=loss or LossOptions(),
        mtp=mtp or MTPOptions(),
        balance=balance or BalanceOptions(),
        value=value or ValueOptions(),
        distill=distill,
        rollout=SimpleNamespace(temperature=temperature, max_completion_tokens=max_completion_tokens),
    )
    return make(policy, config, load=lambda name: teacher, **more)


def supervised_learner(
    policy: Policy,
    options: LearnerOptions | None = None,
    mtp: MTPOptions | None = None,
    *,
    balance: BalanceOptions | None = None,
) -> Learner:
    """For batches of gold solutions."""
    config = SimpleNamespace(mtp=mtp or SftMTPOptions(), balance=balance or BalanceOptions())
    terms = [SupervisedTerm(), *terms_of(policy, config)]
    return Learner(policy, options or LearnerOptions(), terms, Likelihood(policy, watchers=terms))


def term_of(learner: Learner, name: str) -> Any:
    [term] = [term for term in learner.terms if term.name == name]
    return term


def last_work(learner: Learner) -> Work:
    """What the last update was made from."""
    [work] = learner._done
    return work
