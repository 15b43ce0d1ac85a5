"""Run by test_eight_bit.py in N ranks: steps with 8-bit moments, saved, and taken up again.

It makes three steps, or those that are left after CHECKPOINT. FOLDER gets step_000002 and step_000003.
"""

from pathlib import Path

import torch
from recorded import groups_of
from small_learner import small_learner

from grpo.config.learner import LearnerOptions, MTPOptions, ParallelOptions
from grpo.learner.parallel import join
from grpo.run import checkpoint
from policies.policy import Policy


def main(source: Path, folder: Path, dtype: str, saved: Path | None = None) -> None:
    torch.set_num_threads(1)
    ranks = join(True, ParallelOptions())
    policy = Policy.load(source, getattr(torch, dtype), layout=ranks.layout)
    options = LearnerOptions(
        optimizer="adamw_8bit_stochastic" if dtype == "bfloat16" else "adamw_8bit",
        learning_rate=1e-3,
        tokens_per_micro_batch=60,
    )
    learner = small_learner(policy, options, MTPOptions(depth=2), ranks=ranks)
    first = 1
    if saved:
        found = checkpoint.load(saved)
        learner.load_state(found.tensors, found.state)
        first = found.step + 1
    for step in range(first, 4):
        learner.step(learner.prepare(*groups_of(5)), step)
        if step > 1:
            checkpoint.save(folder, step, *learner.state())
