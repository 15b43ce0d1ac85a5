"""Fine-tune language models by reinforcement learning (GRPO), with runs that repeat bit for bit.

    from grpo import TrainConfig, train

    def short(completions, **columns):
        return [-len(text) / 100 for text in completions]

    result = train(TrainConfig(output_dir="runs/short", steps=2), reward=short)
    result.metrics[-1]["reward/mean"]

Every name is loaded when it is first used, so that the command answers at once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.algorithm.own import advantage, objective
    from grpo.config.run import SftConfig, TrainConfig
    from grpo.learner.learner import Learner
    from grpo.session import Session
    from grpo.sft import sft
    from grpo.source.policy_source import load_policy
    from grpo.train import train
    from rewards.group_score import GroupScore

_HOMES = {
    "GroupScore": "rewards.group_score",
    "Learner": "grpo.learner.learner",
    "Session": "grpo.session",
    "SftConfig": "grpo.config.run",
    "TrainConfig": "grpo.config.run",
    "advantage": "grpo.algorithm.own",
    "load_policy": "grpo.source.policy_source",
    "objective": "grpo.algorithm.own",
    "sft": "grpo.sft",
    "train": "grpo.train",
}
__all__ = [
    "GroupScore",
    "Learner",
    "Session",
    "SftConfig",
    "TrainConfig",
    "advantage",
    "load_policy",
    "objective",
    "sft",
    "train",
]


class _Package(ModuleType):
    """`train` and `sft` are functions here, though modules of the same names hold them: importing these would put the
    modules into their places."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
