"""A rank that is not the first: it learns what rank 0 learns, on its share of the rows, and does nothing else."""

from __future__ import annotations

from contextlib import suppress

import torch

from grpo.config.run import SftConfig, TrainConfig
from grpo.learner.learner import Learner, NonFiniteStep
from grpo.learner.parallel import RankFailed, Team
from grpo.loader import device_of
from grpo.run.stop import Stopped, ignore_signals
from grpo.train import grpo_learner
from grpo.warm_start import sft_learner
from policies.policy import Policy


def follow(config: SftConfig, ranks: Team) -> None:
    """Work for rank 0 until it ends. Raises RankFailed with the words of the rank that failed, or rank 0's Stopped."""
    ignore_signals()  # rank 0 decides how the run ends
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        learner: Learner | None = None
        while True:
            match ranks.receive():
                case ("begin", kind, skeleton, dtype):
                    policy = Policy.from_skeleton(skeleton, getattr(torch, dtype)).to(device_of(config.device))
                    policy.load_weights(ranks.broadcast())
                    learner = _learner(kind, policy, config, ranks)
                case ("state", state, names) if learner is not None:
                    learner.load_state({name: ranks.broadcast() for name in names}, state)
                case ("call", name, arguments) if learner is not None:
                    with suppress(NonFiniteStep):  # rank 0 meets the same, and decides
                        getattr(learner, name)(*arguments)
                case ("end", stopped):
                    if stopped:
                        raise Stopped(stopped)
                    return
    except (RankFailed, Stopped):
        raise
    except BaseException as error:
        ranks.fail(f"{type(error).__name__}: {error}")
        raise


def _learner(kind: str, policy: Policy, config: SftConfig, ranks: Team) -> Learner:
    if kind == "sft":
        return sft_learner(policy, config, ranks)
    assert isinstance(config, TrainConfig)
    return grpo_learner(policy, config, ranks=ranks)
