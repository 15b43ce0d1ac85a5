"""The policy: DeepSeek-V3 architecture (MoE + MLA) with a multi-token prediction head, without anything of RL.

The public names are loaded when they are first used: importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policies.layout import PolicyError
    from policies.policy import Policy
    from policies.presets import PRESETS, build

_HOMES = {
    "PRESETS": "policies.presets",
    "Policy": "policies.policy",
    "PolicyError": "policies.layout",
    "build": "policies.presets",
}
__all__ = ["PRESETS", "Policy", "PolicyError", "build"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
