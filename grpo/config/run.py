"""The options of a training run, `quartet sft` and `quartet train`. The reference page is generated from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from grpo.config.data import DataOptions
from grpo.config.environment import AgentOptions, EnvironmentOptions
from grpo.config.features import sections
from grpo.config.learner import LearnerOptions, LoraOptions, MTPOptions, WarmStartOptions
from grpo.config.loss import LossOptions
from grpo.config.options import Options, load
from grpo.config.policy import ModelOptions
from grpo.config.reward import RewardsOptions
from grpo.config.sampling import RolloutOptions


class CheckpointOptions(Options):
    """When to save and what to keep."""

    every: int = Field(default=50, ge=1)
    """Save after every n-th step, and at the end."""
    keep: int | None = Field(default=2, ge=1)
    """How many checkpoints are kept, the newest ones; null keeps all."""
    keep_best: bool = False
    """Keep the best checkpoint too, and write its policy to `best_policy/`. It is the best by eval/accuracy, or by
    eval/reward_mean where the reward is no accuracy (evaluated steps are saved then), or by reward/mean over the
    `every` steps before it where nothing was evaluated. GRPO only."""


class EvalOptions(Options):
    """Held-out evaluation before, during and after training; its time does not count as training time."""

    every: int | None = Field(default=None, ge=1)
    """Evaluate after every n-th step too; null evaluates only before the first step and after the last."""
    limit: int = Field(default=0, ge=0)
    """Held-out problems; 0 turns evaluation off."""
    samples: int = Field(default=1, ge=1)
    """Completions per problem at the sampling temperature; above 1, pass@k and majority votes too where there is an
    accuracy."""
    split: str | None = None
    """The held-out split; `heldout` for word_problems, `test` otherwise."""
    levels: list[int] | None = None
    """Levels of `word_problems`; those of `data` by default."""
    prompts_per_batch: int = Field(default=64, ge=1)
    """Problems that are sampled together."""


class LogOptions(Options):
    """What a person sees and what is kept."""

    every: int = Field(default=1, ge=1)
    """Print a line after every n-th step, and after the first and the last one. A terminal shows a panel instead."""
    table_every: int = Field(default=10, ge=1)
    """Show a table of sample completions after every n-th step."""
    trackers: list[str] | None = None
    """Trackers of accelerate (`tensorboard`, `wandb`, ...); TensorBoard when installed, [] for none."""
    alarms: bool = True
    """Warn where a reward seems to be hacked: it follows length, repetition, numbers of the question or the form of an
    answer better than right answers. GRPO only."""
    measure_speed: bool = False
    """At the end, time sampling with and without drafts on held-out prompts."""


class RunConfig(RewardsOptions, ModelOptions):
    """What `quartet sft`, `train` and `mtp` have in common: a policy, a run folder, data, rewards and rollouts."""

    output_dir: Path
    """The run folder; the trained policy is written to `policy/` in it."""
    data: DataOptions = DataOptions()
    rollout: RolloutOptions = RolloutOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()

    @classmethod
    def read(cls, file: Path | str, **overrides: Any) -> Self:
        """The configuration in a YAML file, with these options in place of its own: `read(file, steps=20)`, and by
        `**{"rollout.ahead": 1}` those of a section. Raises ConfigError with all that is wrong."""
        return load(cls, Path(file), overrides)


class SftConfig(sections("sft"), EnvironmentOptions, RunConfig):  # type: ignore[misc]
    """Supervised fine-tuning on prompts and gold solutions; the MTP head is trained together with the trunk."""

    # What `quartet sft --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.limit", "data.template", "data.prompt_column"),
        *("data.solution_column", "warm_start.steps", "warm_start.batch_size", "warm_start.learning_rate"),
        *("warm_start.schedule", "learner.tokens_per_micro_batch", "mtp.loss_weight", "mtp.depth", "rewards"),
        *("eval.limit", "rollout.max_completion_tokens", "checkpoint.every", "dtype", "threads", "seed"),
    )
    warm_start: WarmStartOptions = WarmStartOptions(steps=200)
    mtp: MTPOptions = MTPOptions()
    learner: LearnerOptions = LearnerOptions()
    eval: EvalOptions = EvalOptions()


class TrainConfig(sections("train"), AgentOptions, SftConfig):  # type: ignore[misc]
    """GRPO, after an optional warm start: sample groups, score them, favour what scored above its group."""

    # What `quartet train --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.template", "rewards", "steps", "prompts_per_step"),
        *("rollout.group_size", "rollout.temperature", "rollout.max_completion_tokens", "rollout.workers"),
        *("learner.learning_rate", "learner.tokens_per_micro_batch", "loss.loss_type", "loss.beta", "lora.rank"),
        *("warm_start.steps", "eval.limit", "eval.every", "checkpoint.every", "dtype", "seed"),
    )
    steps: int = Field(default=100, ge=1)
    """Steps of GRPO; one step samples, scores and learns once."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts per step; completions per step are this times rollout.group_size."""
    warm_start: WarmStartOptions = WarmStartOptions()
    lora: LoraOptions | None = None
    """Adapters; null updates every weight."""
    loss: LossOptions = LossOptions()
