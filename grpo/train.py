"""A run of GRPO from beginning to end: sample, score, learn, publish, and again."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.config.run import TrainConfig
from grpo.evaluation.held_out import Result
from grpo.session import Session
from rewards.config.reward import with_rewards
from rewards.protocol import Reward


def train(
    config: TrainConfig,
    *,
    reward: Reward | Sequence[Reward] | None = None,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
) -> Result:
    """The policy is saved to `output_dir/policy`. `reward` are functions of this process in place of `config.rewards`.

    Raises Stopped when the run was asked to end early.
    """
    config = with_rewards(config, reward)
    with Session.open(config, resume=resume, stop_after=stop_after, force=force) as session:
        for step in session.run.steps():
            drawn = session.draw(step)  # prompts, groups of completions and their scores
            batch = session.prepare(drawn)  # advantages, in packed rows
            metrics = session.learn(batch)  # forward, backward, a step of the optimizer
            session.sync_weights()
            session.record(step, metrics)
            session.save_if_due(step)
            session.evaluate_if_due(step)
        return session.finish()
