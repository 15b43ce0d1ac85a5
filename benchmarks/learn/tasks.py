"""What the contenders learn: each task has a policy that an SFT stage has made, and problems that no step has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.config.run import TrainConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Task:
    """`config` is a file of the repository, `changes` are options over it. The policy that all contenders of a seed
    begin with is that of the configuration's SFT stage. A contender has a run of each number of `steps`, after which
    `held_out` problems are answered."""

    name: str
    title: str
    config: str
    steps: tuple[int, ...]
    held_out: int
    changes: dict[str, Any] = field(default_factory=dict)


QUIET = {"threads": 1, "log.trackers": [], "checkpoint.every": 10_000, "mtp.loss_weight": 0}
DECAY = {"learner.schedule": "linear"}  # a run at a constant rate would be compared in the middle of its learning
TASKS = {
    task.name: task
    for task in (
        Task(
            "words",
            "Word problems, the demo's policy",
            "benchmarks/learn/words.yaml",
            steps=(15, 30, 60),
            held_out=1024,
        ),
        Task(
            "spelling",
            "Spelling words backward (reasoning-gym), the demo's policy",
            "benchmarks/learn/words.yaml",
            steps=(15, 30, 60),
            held_out=200,  # of more some are among the training words
            changes={
                "data.name": "reasoning_gym:spell_backward",
                "data.limit": 4000,
                "data.task_options": {"min_word_len": 3, "max_word_len": 7},
                "rewards": [{"function": "reasoning_gym"}],
                "rollout.max_completion_tokens": 16,
                "sft.batch_size": 32,
            },
        ),
    )
}


def rate_of(task: Task) -> float:
    """The learning rate of its configuration."""
    return config_of(task, ROOT / "runs").learner.learning_rate


def config_of(task: Task, folder: Path, **changes: Any) -> TrainConfig:
    from grpo.config.run import TrainConfig

    options = {**QUIET, **DECAY, **task.changes, "output_dir": str(folder), **changes}
    return TrainConfig.read(ROOT / task.config, **options)


def start(task: Task, seed: int, folder: Path) -> Path:
    """The policy of a seed: that of the SFT stage, in `folder`, which is made once."""
    policy = folder / "warm_start"
    if not (folder / "policy").exists():
        from grpo.train import train

        train(config_of(task, folder, seed=seed, steps=1, **{"eval.limit": 0, "learner.learning_rate": 1e-12}))
    return policy
