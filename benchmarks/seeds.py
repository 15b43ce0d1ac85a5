"""What benchmarks over three seeds share: SFT of the demo's policy on word problems, and an interval of a mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

STUDENT_T = 4.303  # 95 %, two degrees of freedom: three seeds


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of three values; NaN of another number of them.

    >>> round(half_interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    return STUDENT_T * stdev(values) / len(values) ** 0.5 if len(values) == 3 else float("nan")


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Of each seed, as JSON has it: `half_of_its_interval` is null but for three.

    >>> interval([1.0, 2.0])
    {'each': [1.0, 2.0], 'mean': 1.5, 'half_of_its_interval': None}
    """
    half = half_interval(values) if len(values) == 3 else None
    return {"each": list(values), "mean": fmean(values), "half_of_its_interval": half}


def sft_options(folder: Path, seed: int, steps: int, problems: int) -> dict[str, Any]:
    """Options of `quartet sft`: a policy of examples/01_demo.yaml's size on word problems of levels 1 to 3."""
    return {
        "model": "tiny",
        "seed": seed,
        "output_dir": str(folder),
        "data.name": "word_problems",
        "data.levels": [1, 2, 3],
        "rewards": [{"function": "gsm8k"}],
        "warm_start.steps": steps,
        "warm_start.batch_size": 16,
        "warm_start.learning_rate": 2e-3,
        "warm_start.warmup_steps": 20,
        "learner.tokens_per_micro_batch": 4096,
        "rollout.max_completion_tokens": 96,
        "eval.limit": problems,
        "log.trackers": [],
    }
