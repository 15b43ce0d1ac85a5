"""Options of the commands that use a policy and do not train it: `quartet eval` and `quartet sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from grpo.config import ModelOptions, RewardOptions, ScoringOptions, gsm8k_reward


class EvalConfig(ModelOptions):
    """Accuracy on held-out problems, sampled and greedy. A run folder brings its data, template and rewards along."""

    data: str = "word_problems"
    """`word_problems`, `gsm8k`, a hub id, a folder with test.jsonl, or one data file."""
    split: str | None = None
    """The split; `heldout` for word_problems, `test` otherwise."""
    levels: list[int] = Field(default_factory=lambda: [1, 2], min_length=1)
    """Difficulty levels of `word_problems`, 1 to 4."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many problems only."""
    samples: int = Field(default=1, ge=1)
    """Completions per problem at the sampling temperature."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the sampled row; the greedy row has none."""
    max_completion_tokens: int = Field(default=256, ge=1)
    """A completion ends here if it has not stopped by itself."""
    draft_tokens: int | None = Field(default=None, ge=0)
    """Drafts of the MTP head per forward of the trunk, 0 for none; null is 4 with a head. Never changes a token."""
    prompts_per_batch: int = Field(default=32, ge=1)
    """Problems that are sampled together."""
    prompt_column: str = "question"
    """The column that becomes the prompt."""
    solution_column: str = "answer"
    """The column with the gold solution."""
    template: str = "{question}\n"
    """A format string over the data's columns, or `chat` for the model's own chat template."""
    system_prompt: str | None = None
    """System message in front of every chat prompt (template: chat)."""
    few_shot: int = Field(default=0, ge=0)
    """Worked examples from the training split in front of every prompt."""
    rewards: list[RewardOptions] = Field(default_factory=gsm8k_reward, min_length=1)
    """Reward functions; full marks from the first count as correct."""
    reward: ScoringOptions = ScoringOptions()


class SampleConfig(ModelOptions):
    """Completions of your own prompts, one {"prompt": ...} a line."""

    group_size: int = Field(default=4, ge=1)
    """Completions per prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    max_completion_tokens: int = Field(default=256, ge=1)
    """A completion ends here if it has not stopped by itself."""
    draft_tokens: int | None = Field(default=None, ge=0)
    """Drafts of the MTP head per forward of the trunk, 0 for none; null is 4 with a head. Never changes a token."""
    template: str = "{prompt}"
    """A format string around `prompt`, or `chat` for the model's own chat template."""
    system_prompt: str | None = None
    """System message in front of every chat prompt (template: chat)."""


def defaults_of_run(folder: Path) -> dict[str, Any]:
    """Options of `quartet eval` that a run folder brings along, so that its held-out problems are met again."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    run = yaml.safe_load(path.read_text())
    data, rollout = run["data"], run["rollout"]
    kept = ("prompt_column", "solution_column", "template", "system_prompt", "few_shot")
    return {
        "data": data["name"],
        "split": run["eval"]["split"],
        "levels": run["eval"]["levels"] or data["levels"],
        **{name: data[name] for name in kept},
        **{name: rollout[name] for name in ("temperature", "max_completion_tokens", "draft_tokens")},
        **{name: run[name] for name in ("seed", "rewards", "reward")},
        "limit": run["eval"]["limit"] or None,
    }
