"""What the contenders learn: each task has a policy that a warm start has made, and problems that no step has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Task:
    """`config` is a file of examples/, `changes` are options over it. `start` makes the policy that all contenders of a
    seed begin with; its model is then used in place of the configuration's. Held-out problems are answered after every
    `every` steps, at T = 1."""

    name: str
    config: str
    steps: int
    every: int
    held_out: int
    changes: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, Any] = field(default_factory=dict)  # options of the run that makes the policy
    model: str | None = None  # a policy that every seed begins with; None: each has its own warm start


QUIET = {"threads": 1, "log.measure_speed": False, "log.trackers": [], "checkpoint.every": 10_000, "mtp.loss_weight": 0}
TASKS = {
    task.name: task
    for task in (
        Task("words", "01_demo.yaml", steps=60, every=5, held_out=512),
        Task(
            "sums",
            "01_demo.yaml",
            steps=60,
            every=5,
            held_out=512,
            changes={
                "data.name": "reasoning_gym:chain_sum",
                "data.levels": None,
                "data.task_options": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
                "rewards": [{"function": "reasoning_gym"}],
                "rollout.max_completion_tokens": 16,
            },
        ),
        Task("game", "10_word_game.yaml", steps=60, every=10, held_out=256),
        Task(
            "gsm8k",
            "05_gsm8k_recipe/3_grpo.yaml",
            steps=40,
            every=10,
            held_out=200,
            model="runs/gsm8k/sft/policy",
            changes={"data.held_out": 0.1},
        ),
    )
}
