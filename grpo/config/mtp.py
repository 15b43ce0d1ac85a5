"""Options of `quartet mtp`: teaching a policy's draft head what the policy itself would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from grpo.config.run import NEW_FOLDER, EvalOptions, RunConfig, SftConfig
from grpo.config.sampling import WorkersOptions
from rewards.config.json_file import expecting
from rewards.config.names import recorded_options
from rewards.config.options import Options
from rewards.config.reward import RewardsOptions


class HeadOptions(Options):
    """How the draft head is taught; the trunk stays as it is."""

    depth: int = Field(default=4, ge=1)
    """How many depths are unrolled, and drafted in the evaluation; the first epochs unroll 1, 2, ... of them."""
    epochs: int = Field(default=12, ge=1)
    """Most passes over the corpus. An epoch that gains nothing in held-out rollouts is undone, and the next one has a
    quarter of the learning rate and minimises total variation, the share of rejected drafts, and not KL; the third such
    epoch is the last."""
    restart: bool | None = None
    """Start the draft head as the trunk's last layer, fitted to training examples; null does so where there is none."""
    draft_vocabulary: int | None = Field(default=None, ge=16)
    """Draft only from this many tokens: the most frequent ones in the first step's rollouts, and the stop tokens. null
    drafts any token. Fewer make drafts cheaper and never change a completion."""
    solutions: int = Field(default=0, ge=0)
    """Gold solutions that every step adds to its rollouts: the trunk reads them, which is cheaper than to sample."""
    tokens_per_update: int = Field(default=1024, ge=1)
    """Padded tokens of one optimizer update; groups longer than this are cut."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the draft head, which it reaches after 20 updates."""


class MtpConfig(RunConfig):
    """Self-distillation of the draft head: sample a corpus from the policy, teach it the policy's distributions. A
    DeepSeek-V3 checkpoint that has no draft head gets a fresh one. Rewards are for the evaluation alone: drafts change
    no token, so accuracy is the same before and after."""

    command: ClassVar[str] = "mtp"
    # What `quartet mtp --help` shows; `--help all` shows all.
    common: ClassVar[tuple[str, ...]] = (
        *("model", "output_dir", "data.name", "data.template", "steps", "prompts_per_step", "rollout.group_size"),
        *("rollout.temperature", "rollout.max_completion_tokens", "mtp.depth", "mtp.epochs"),
        *("mtp.learning_rate", "mtp.draft_vocabulary", "mtp.solutions", "mtp.restart", "mtp.tokens_per_update"),
        *("eval.limit", "checkpoint.every", "dtype", "seed"),
    )
    output_dir: Path = NEW_FOLDER
    """The run folder; the policy with its trained draft head is written to `policy/` in it. The default is a new folder
    with the time of the start in its name, such as `runs/mtp-20261201-224500`."""
    steps: int = Field(default=60, ge=1)
    """Batches of rollouts, which make the corpus; mtp.epochs pass over it afterwards, and count as steps too."""
    prompts_per_step: int = Field(default=16, ge=2)
    """Prompts per batch; its completions are this times rollout.group_size. The rollouts of an eighth of the training
    prompts are not learned from: they tell what an epoch gains."""
    rollout: WorkersOptions = WorkersOptions(group_size=4)
    mtp: HeadOptions = HeadOptions()
    eval: EvalOptions = EvalOptions(limit=32)


def scores_nothing(config: RunConfig) -> bool:
    """Tells whether nothing is scored: rewards are for an evaluation alone, there is none, and nobody named one: the
    default reads numbers, and data for supervised training need not have any."""
    unused = isinstance(config, SftConfig | MtpConfig) and not config.eval.limit
    return unused and config.rewards == RewardsOptions().rewards


def defaults_of_run(folder: Path) -> dict[str, Any]:
    """Reads what a run folder brings to `quartet mtp FOLDER`: data, rewards, sampling and precision of that run."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    _, run = recorded_options(path)
    with expecting(path, "configuration of a run"):
        brought = _defaults(run)
        MtpConfig.model_validate({"output_dir": folder} | brought, context={"checked_only": True})
    return brought


def _defaults(run: dict[str, Any]) -> dict[str, Any]:
    whole = ("data", "rewards", "reward", "dtype", "device", "seed")
    parts = {"rollout": ("temperature", "max_completion_tokens", "prompts_per_shard"), "eval": ("split",)}
    brought = {name: run[name] for name in whole if name in run}
    return brought | {
        part: {name: run[part][name] for name in names if name in run[part]} for part, names in parts.items()
    }
