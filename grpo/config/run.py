"""The options of a training run, `quartet sft` and `quartet train`. The reference page is generated from here.

A command has the sections that it uses: one that several use in part is a class for each.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from grpo.config.environment import OF_EPISODES, AgentOptions, EnvironmentOptions
from grpo.config.features import sections
from grpo.config.learner import (
    LearnerOptions,
    LoraOptions,
    MTPOptions,
    SftLearnerOptions,
    SftMTPOptions,
    SftStageOptions,
    UpdateOptions,
)
from grpo.config.loss import LossOptions
from grpo.config.policy import ArchitectureOptions, ModelOptions
from grpo.config.sampling import LARGEST_GROUP, RolloutOptions, SamplingOptions
from rewards.config.data import SourceOptions, check_sources
from rewards.config.options import OneOrMore, Options, load
from rewards.config.reward import RewardsOptions
from rewards.spec import RewardSpec

NEW_FOLDER = Path("runs/{command}-{time}")


class CheckpointOptions(Options):
    """When to save and what to keep."""

    every: int = Field(default=50, ge=1)
    """Save after every n-th step, and at the end."""
    keep: int | None = Field(default=2, ge=1)
    """How many checkpoints are kept, the newest ones; null keeps all."""


class GrpoCheckpointOptions(CheckpointOptions):
    """When to save and what to keep."""

    keep_best: bool = False
    """Keep the best checkpoint too, and write its policy to `best_policy/`. It is the best by eval/accuracy, or by
    eval/reward_mean where the reward is no accuracy (evaluated steps are saved then), or by reward/mean over the
    `every` steps before it where nothing was evaluated."""


class EvalOptions(Options):
    """Held-out evaluation before and after training; its time does not count as training time."""

    limit: int = Field(default=0, ge=0)
    """Held-out problems; 0 turns evaluation off."""
    samples: int = Field(default=1, ge=1, le=LARGEST_GROUP)
    """Completions per problem at the sampling temperature; above 1, pass@k and majority votes too where there is an
    accuracy."""
    split: str | None = None
    """The held-out split; `held_out` for word_problems, `test` otherwise."""


class GrpoEvalOptions(EvalOptions):
    """Held-out evaluation before, during and after training; its time does not count as training time."""

    every: int | None = Field(default=None, ge=1)
    """Evaluate after every n-th step too; null evaluates only before the first step and after the last."""


class LogOptions(Options):
    """What a person sees and what is kept."""

    trackers: list[str] | None = None
    """Trackers of accelerate (`tensorboard`, `wandb`, ...); TensorBoard when installed, [] for none."""


class RunConfig(RewardsOptions, ModelOptions):
    """What `quartet sft`, `train` and `mtp` have in common: a policy, a run folder, data and rewards."""

    output_dir: Path = NEW_FOLDER
    """The run folder; the trained policy is written to `policy/` in it. The default is a new folder with the time of
    the start in its name, such as `runs/train-20261201-224500`."""
    data: Annotated[list[SourceOptions], OneOrMore] = Field(default_factory=lambda: [SourceOptions()])
    """Where prompts come from. `data: [{name: gsm8k, weight: 2}, {name: my.jsonl, rewards: [mine]}]` mixes several
    sources, `data: [gsm8k, my.jsonl]` with equal weights; `eval.limit` counts the held-out problems of each."""
    rollout: SamplingOptions = SamplingOptions()
    eval: EvalOptions = EvalOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()

    @field_validator("output_dir")
    @classmethod
    def _with_time(cls, output_dir: Path) -> Path:
        """Name the default folder. The time is read once, here, so config.yaml has the real path. No shell has replaced
        the ~ of a file, nor that of `--output_dir=~/runs/mine`."""
        if output_dir != NEW_FOLDER:
            return Path(os.path.expanduser(output_dir))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("name a run folder: each of several processes would choose a different one")
        return Path(f"runs/{getattr(cls, 'command', 'run')}-{time.strftime('%Y%m%d-%H%M%S')}")

    @field_validator("data")
    @classmethod
    def _check_sources(cls, data: list[SourceOptions]) -> list[SourceOptions]:
        return check_sources(data)

    @model_validator(mode="after")
    def _every_reward_scores(self) -> Self:
        functions = {RewardSpec(reward.function, name=reward.name).label: reward.function for reward in self.rewards}
        scoring: set[str] = set()
        for source in self.data:
            scoring.update(source.rewards or functions)
        for label in sorted(scoring - set(functions)):
            raise ValueError(
                f"data.rewards: no reward is called {label!r}; the rewards of the run are "
                f"{', '.join(functions) or 'none'}"
            )
        for label, function in functions.items():
            if label not in scoring and function not in OF_EPISODES:
                raise ValueError(f"rewards: {label!r} scores no source of data; name it in data.rewards, or drop it")
        return self

    @classmethod
    def read(cls, file: Path | str, **overrides: object) -> Self:
        """The configuration in a YAML file, with these options in place of its own: `read(file, steps=20)`, and by
        `**{"rollout.staleness": 1}` those of a section. Raises ConfigError with all that is wrong."""
        return load(cls, Path(file), overrides)

    @property
    def whole_rollout(self) -> RolloutOptions:
        """Gives all options of sampling: `rollout`, with the defaults of what the command has no option for."""
        return RolloutOptions.of(self.rollout)


class LearningConfig(sections("sft"), EnvironmentOptions, ArchitectureOptions, RunConfig):  # type: ignore[misc]
    """What `quartet sft` and `train` have in common: a policy whose weights move."""

    learner: UpdateOptions = UpdateOptions()
    mtp: MTPOptions = MTPOptions()

    @property
    def supervision(self) -> SftStageOptions:
        """Gives the options of the run's supervised steps; each command has them in another place."""
        raise NotImplementedError


class SftConfig(LearningConfig):
    """Supervised fine-tuning on prompts and gold solutions; the draft head is trained together with the trunk. Rewards
    and rollouts are for the evaluation alone."""

    command: ClassVar[str] = "sft"
    # What `quartet sft --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.limit", "data.template", "data.prompt_column"),
        *("data.solution_column", "steps", "prompts_per_step", "learner.learning_rate", "learner.schedule"),
        *("learner.tokens_per_micro_batch", "mtp.loss_weight", "mtp.depth", "rewards", "eval.limit"),
        *("rollout.max_completion_tokens", "checkpoint.every", "dtype", "seed"),
    )
    steps: int = Field(default=200, ge=1)
    """Optimizer steps."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Examples per step."""
    learner: SftLearnerOptions = SftLearnerOptions()
    mtp: SftMTPOptions = SftMTPOptions()

    @property
    def supervision(self) -> SftStageOptions:
        rates = {name: getattr(self.learner, name) for name in ("learning_rate", "schedule", "warmup_steps")}
        return SftStageOptions(steps=self.steps, batch_size=self.prompts_per_step, **rates)


class TrainConfig(sections("train"), AgentOptions, LearningConfig):  # type: ignore[misc]
    """GRPO, after an optional SFT stage: sample groups, score them, favour what scored above its group."""

    command: ClassVar[str] = "train"
    # What `quartet train --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.template", "rewards", "steps", "prompts_per_step"),
        *("rollout.group_size", "rollout.temperature", "rollout.max_completion_tokens"),
        *("learner.learning_rate", "learner.tokens_per_micro_batch", "loss.loss_type", "loss.beta", "lora.rank"),
        *("sft.steps", "eval.limit", "eval.every", "checkpoint.every", "seed"),
    )
    steps: int = Field(default=100, ge=1)
    """Steps of GRPO; one step samples, scores and learns once."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts per step; completions per step are this times rollout.group_size."""
    rollout: RolloutOptions = RolloutOptions()
    learner: LearnerOptions = LearnerOptions()
    eval: GrpoEvalOptions = GrpoEvalOptions()
    checkpoint: GrpoCheckpointOptions = GrpoCheckpointOptions()
    sft: SftStageOptions = SftStageOptions()
    lora: LoraOptions | None = None
    """Adapters; null updates every weight."""
    loss: LossOptions = LossOptions()

    @property
    def supervision(self) -> SftStageOptions:
        return self.sft
