"""Options of `quartet mtp`: teaching a policy's draft head what the policy itself would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from grpo.config.json_file import expecting
from grpo.config.options import Options
from grpo.config.run import EvalOptions, RunConfig
from grpo.config.sampling import RolloutOptions
from grpo.config.yaml_file import read_yaml


class HeadOptions(Options):
    """How the draft head is taught; the trunk stays as it is."""

    depth: int = Field(default=4, ge=1)
    """How many depths are unrolled at the end of training, and drafted in the evaluation."""
    curriculum_share: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps in which the depth grows from 1 to `depth`; 0 unrolls all of them from the start."""
    tv_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps, at the end, that minimise total variation (the share of rejected drafts) instead of KL."""
    restart: bool | None = None
    """Start the head as the trunk's last layer, fitted to training examples; null does so where there is none."""
    draft_vocabulary: int | None = Field(default=None, ge=16)
    """Draft only from this many tokens: the most frequent ones in the first step's rollouts, and the stop tokens. null
    drafts any token. Fewer make drafts cheaper and never change a completion."""
    reuse: int = Field(default=3, ge=1)
    """Passes over each batch of rollouts: sampling is the costly part, and the trunk reads a batch once."""
    tokens_per_update: int = Field(default=1024, ge=1)
    """Padded tokens of one optimizer update; groups longer than this are cut."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the head."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay of the learning rate over `steps`."""
    warmup_steps: int = Field(default=2, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay, on matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""


class MtpConfig(RunConfig):
    """Self-distillation of the draft head: sample groups from the policy, teach the head its own distributions.
    Rewards are for the evaluation alone: drafts change no token, so accuracy is the same before and after."""

    # What `quartet mtp --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.template", "steps", "prompts_per_step", "rollout.group_size"),
        *("rollout.temperature", "rollout.max_completion_tokens", "head.depth", "head.learning_rate"),
        *("head.draft_vocabulary", "head.tv_share", "head.restart", "head.tokens_per_update", "eval.limit"),
        *("checkpoint.every", "dtype", "threads", "seed"),
    )
    output_dir: Path
    """The run folder; the policy with its taught head is written to `policy/` in it."""
    add_mtp: bool = True
    """Give a fresh MTP head to a DeepSeek-V3 checkpoint that has none."""
    steps: int = Field(default=60, ge=1)
    """Batches of rollouts."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per batch; its completions are this times rollout.group_size."""
    rollout: RolloutOptions = RolloutOptions(group_size=4)
    head: HeadOptions = HeadOptions()
    eval: EvalOptions = EvalOptions(limit=32)

    @model_validator(mode="after")
    def _consistent(self) -> MtpConfig:
        head = self.head
        if head.curriculum_share + head.tv_share > 1:
            raise ValueError(
                f"head.curriculum_share={head.curriculum_share} and head.tv_share={head.tv_share} are the first and "
                "the last share of the steps; their sum must be at most 1"
            )
        for key, value in (
            ("eval.every", self.eval.every),
            ("rollout.refill_draws", self.rollout.refill_draws),
            ("rollout.ahead", self.rollout.ahead),
            ("rollout.partial", self.rollout.partial),
            ("checkpoint.keep_best", self.checkpoint.keep_best),
            ("log.measure_speed", self.log.measure_speed),
        ):
            if value:
                raise ValueError(f"{key}={value} is for quartet train; drop it")
        return self


def defaults_of_run(folder: Path) -> dict[str, Any]:
    """What a run folder brings to `quartet mtp FOLDER`: data, rewards, sampling and precision of that run."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    run, _ = read_yaml(path)
    with expecting(path, "configuration of a run"):
        brought = _defaults(run)
        MtpConfig.model_validate({"output_dir": folder} | brought)
    return brought


def _defaults(run: dict[str, Any]) -> dict[str, Any]:
    whole = ("data", "rewards", "reward_models", "reward", "dtype", "device", "seed")
    parts = {"rollout": ("temperature", "max_completion_tokens", "prompts_per_shard"), "eval": ("split", "levels")}
    brought = {name: run[name] for name in whole if name in run}
    return brought | {part: {name: run[part][name] for name in names} for part, names in parts.items()}
