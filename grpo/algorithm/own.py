"""Advantage estimators and objectives of the user's own, named by file as rewards are.

    from grpo import advantage, objective

    @advantage
    def centred(rewards_PG):                   # loss.advantage: mine.py:centred; NaN where there is no reward
        return rewards_PG - rewards_PG.nanmean(1, keepdim=True)

    @advantage
    def late(rewards_PG, lengths_PG, parts):   # also of every token: [P, G, T], of which the first Lc are read
        place = torch.arange(int(lengths_PG.max())) / lengths_PG[..., None]
        return (rewards_PG - rewards_PG.nanmean(1, keepdim=True))[..., None] * place

    @objective(aggregate="dapo")               # loss.loss_type: mine.py:plain
    def plain(ratio, advantages, policy_logprobs, options):
        return ratio * advantages              # [B, T], to be raised

The code runs in the process that learns, so it is trusted as the user's own program is.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast, get_args

import torch
from torch import Tensor

from grpo.algorithm.advantages import tied_groups
from grpo.config.loss import LossOptions, LossType
from rewards.protocol import RewardError
from rewards.registry import load_function

Function = TypeVar("Function", bound=Callable[..., Tensor])
TAKES = {"advantage": ("rewards_PG",), "objective": ("ratio", "advantages", "policy_logprobs", "options")}
MORE = {"lengths_PG", "parts"}  # that an estimator may take
Marks = Sequence[Sequence[float | None]]  # [P, G]
Objective = Callable[[Tensor, Tensor, Tensor, LossOptions], Tensor]


def advantage(function: Function) -> Function:
    """Marks a function rewards [P, G] -> advantages [P, G], or by token [P, G, T], for `loss.advantage`. NaN is a
    completion without reward. A parameter `lengths_PG` gets the completions' tokens, `parts` the marks [P, G] by
    reward.
    """
    function.quartet = "advantage"  # type: ignore[attr-defined]
    return function


def objective(*, aggregate: LossType) -> Callable[[Function], Function]:
    """Marks a function (ratio, advantages, policy_logprobs, options) -> objective, each [B, T], for `loss.loss_type`.

    `aggregate` names the loss whose denominators it has: see `losses.aggregate`.
    """

    def mark(function: Function) -> Function:
        function.quartet, function.aggregate = "objective", aggregate  # type: ignore[attr-defined]
        return function

    return mark


def is_own(name: str) -> bool:
    return ":" in name


def estimate(
    name: str, rewards_PG: Marks, lengths_PG: Sequence[Sequence[int]], parts: Mapping[str, Marks] | None
) -> tuple[Tensor | list[list[list[float]]], Tensor]:
    """Advantages [P, G] by the user's estimator, or by token [P, G, Lc], zero where there is no reward, and which
    groups are tied [P]. Without `parts` every mark is the score.

    Raises ValueError where the result has another shape or is not finite.
    """
    function, rewards, lengths = _load(name, "advantage"), _tensor(rewards_PG), torch.tensor(lengths_PG)
    tensors = {part: _tensor(marks) for part, marks in (parts or {}).items()}
    more = {"lengths_PG": lengths, "parts": defaultdict(lambda: rewards) if parts is None else tensors}
    arguments = {name: value for name, value in more.items() if name in inspect.signature(function).parameters}
    advantages, there = function(rewards.clone(), **arguments), ~rewards.isnan()
    by_token = isinstance(advantages, Tensor) and advantages.dim() == 3
    shape = [*rewards.shape, *([max(int(lengths.max()), advantages.shape[-1])] if by_token else [])]
    if not isinstance(advantages, Tensor) or [*advantages.shape] != shape or not advantages[there].isfinite().all():
        shown = advantages
        if isinstance(advantages, Tensor):
            shown = f"{list(advantages.shape)}, finite: {bool(advantages.isfinite().all())}"
        raise ValueError(f"loss.advantage={name} gave {shown}; give a finite tensor {shape}")
    advantages = advantages.detach().float()
    tied_P = tied_groups(rewards_PG)
    if not by_token:
        return advantages.where(there, torch.zeros(())), tied_P
    advantages = advantages.where(there[..., None], torch.zeros(()))
    groups = zip(advantages.tolist(), lengths_PG, strict=True)
    return [[row[:n] for row, n in zip(*group, strict=True)] for group in groups], tied_P


def _tensor(marks_PG: Marks) -> Tensor:
    return torch.tensor([[float("nan") if mark is None else mark for mark in group] for group in marks_PG])


def objective_of(name: str) -> Objective:
    return _load(name, "objective")


def aggregate_of(loss_type: str) -> LossType:
    """Tells whose denominators a loss has: its own, or for a user's objective those that its decorator names."""
    aggregate = _load(loss_type, "objective").aggregate if is_own(loss_type) else loss_type  # type: ignore[attr-defined]
    return cast(LossType, aggregate)


def try_out(options: LossOptions, group_size: int) -> None:
    """Calls the user's functions once, with numbers made up for two groups, before any model is loaded.

    Raises ValueError where one is not there, is not marked, takes or gives something else than it should, or fails.
    """
    rewards = [[float(i % 2) for i in range(group_size)], [float(i == 0) for i in range(group_size)]]
    lengths = [[1 + i for i in range(group_size)]] * 2
    ones = torch.ones(2, group_size)
    for name, call in (
        (options.advantage, lambda name: estimate(name, rewards, lengths, None)),
        (options.loss_type, lambda name: _shaped(name, objective_of(name)(ones, ones, -ones, options), ones)),
    ):
        if is_own(name):
            try:
                call(name)
            except (ValueError, RewardError):
                raise
            except Exception as error:  # whatever the user's code raises
                raise ValueError(f"{name} failed when it was tried: {type(error).__name__}: {error}") from error


def _shaped(name: str, value: object, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != like.shape:
        shown = list(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(f"loss.loss_type={name} gave {shown}; give a tensor {list(like.shape)}")


def _load(name: str, kind: str) -> Callable[..., Tensor]:
    function = load_function(name, "loss.advantage" if kind == "advantage" else "loss.loss_type")
    if getattr(function, "quartet", None) != kind:
        mark = "@grpo.advantage" if kind == "advantage" else '@grpo.objective(aggregate="dapo")'
        raise ValueError(f"{name} is not marked: write {mark} above it")
    takes = TAKES[kind]
    try:
        more = inspect.signature(function).parameters.keys() & MORE if kind == "advantage" else ()
        inspect.signature(function).bind(*takes, **dict.fromkeys(more))
    except TypeError as error:
        shown = f"{name.rpartition(':')[2]}{inspect.signature(function)}"
        raise ValueError(f"{name}: {shown} is called with {', '.join(takes)}, and {error}; give it these") from error
    if kind == "objective" and (aggregate := function.aggregate) not in get_args(LossType):  # type: ignore[attr-defined]
        known = ", ".join(get_args(LossType))
        raise ValueError(f"{name} has aggregate={aggregate!r}, which is no loss; use one of {known}")
    return function
