"""The table of features: a line each. Without its line and its files a feature is gone, and nothing else changes.

A feature may bring a section of options (grpo/config/NAME.py), a term of the loss (grpo/learner/terms/NAME.py) and a
callback (grpo/steps/NAME.py), whose METRICS say what it writes. Samplers have the table of rollout/workers/kinds.py.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import create_model

from rewards.config.options import Options


@dataclass(frozen=True)
class Feature:
    """`section` names the command whose configuration has the section; train has those of sft, too."""

    name: str
    section: Literal["sft", "train"] | None = None
    term: bool = False
    callback: bool = False


# Terms add up, and callbacks are asked, in this order.
FEATURES = (
    Feature("distill", section="train", term=True),
    Feature("balance", section="sft", term=True),
    Feature("value", section="train", term=True),
    Feature("draft_head", term=True),
    Feature("curriculum", section="train", callback=True),
    Feature("zero_variance_steps", callback=True),
    Feature("alarms", callback=True),
    Feature("mix", callback=True),
)


def sections(command: Literal["sft", "train"]) -> type[Any]:
    """A base class for the configuration of this command, with the sections of its features."""
    fields: dict[str, Any] = {}
    for feature in FEATURES:
        if feature.section == command:
            module = importlib.import_module(f"grpo.config.{feature.name}")
            section = getattr(module, f"{feature.name.capitalize()}Options")
            fields[feature.name] = (section, section())
    return create_model(f"{command.capitalize()}Sections", __base__=Options, **fields)
