"""Rollouts: prompts become groups of completions. The policy's MTP head drafts them, and drafts change no token.

The public names are loaded when they are first used: importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollout.decoding.engine import Engine
    from rollout.faults import RolloutError
    from rollout.group import Completion, DraftStats, Prompt, RolloutGroup
    from rollout.sampling import SamplingParams
    from rollout.workers.kinds import open_pool

_HOMES = {
    "Completion": "rollout.group",
    "DraftStats": "rollout.group",
    "Engine": "rollout.decoding.engine",
    "Prompt": "rollout.group",
    "RolloutError": "rollout.faults",
    "RolloutGroup": "rollout.group",
    "SamplingParams": "rollout.sampling",
    "open_pool": "rollout.workers.kinds",
}
__all__ = [
    "Completion",
    "DraftStats",
    "Engine",
    "Prompt",
    "RolloutError",
    "RolloutGroup",
    "SamplingParams",
    "open_pool",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
