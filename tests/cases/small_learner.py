"""Learners from the options that a test cares about, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

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
    return watched(make(policy, config, load=lambda name: teacher, **more))


def learner_of(policy: Policy, *, mtp: float = 0.0, depth: int = 3, **given: Any) -> Learner:
    """Options of learner and loss are given by their own names, wherever they belong. It clips nothing."""
    loss = {name: given.pop(name) for name in list(given) if name in LossOptions.model_fields}
    names = LearnerOptions.model_fields.keys() - {"schedule"}
    options = {name: given.pop(name) for name in list(given) if name in names}
    options = {"learning_rate": 1e-3, "max_grad_norm": 1e9} | options
    head = MTPOptions(loss_weight=mtp, depth=depth)
    return small_learner(policy, LearnerOptions(**options), head, LossOptions(**loss), **given)


def gradients_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights and AdamW's state by name, and the version."""
    parts, state = learner.state()
    tensors = {f"{part}/{name}": tensor.clone() for part, named in parts.items() for name, tensor in named.items()}
    return tensors | {"version": torch.tensor(state["policy_version"])}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= relative * other[name].norm() + 1e-8, name


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
    return watched(Learner(policy, options or LearnerOptions(), terms, Likelihood(policy, watchers=terms)))


def watched(learner: Learner) -> Learner:
    """It keeps the works of its last step, for `last_work`."""
    finish = learner.finish

    def noted(works: Sequence[Work]) -> dict[str, float]:
        learner.finished = list(works)
        return finish(works)

    learner.finish = noted
    return learner


def term_of(learner: Learner, name: str) -> Any:
    [term] = [term for term in learner.terms if term.name == name]
    return term


def last_work(learner: Learner) -> Work:
    """What the last step was made from."""
    [work] = learner.finished
    return work
