"""Supervised fine-tuning on prompts and gold solutions, the draft head trained beside the trunk.

The SFT stage is the same loop on a part of a run of GRPO (grpo/steps/supervise.py).
"""

from __future__ import annotations

from grpo.config.run import SftConfig
from grpo.evaluation.held_out import Result
from grpo.session import Session


def sft(
    config: SftConfig,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
) -> Result:
    """The policy is saved to `output_dir/policy`. Raises Stopped when the run was asked to end early."""
    with Session.open(config, resume=resume, stop_after=stop_after, force=force) as session:
        for step in session.run.steps():
            rows = session.solutions(config.prompts_per_step)  # prompts with their gold solutions
            batch = session.prepare_solutions(rows)
            metrics = session.learn(batch)  # forward, backward, a step of the optimizer
            session.record(step, metrics)
            session.save_if_due(step)
        return session.finish()
