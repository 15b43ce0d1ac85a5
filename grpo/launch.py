"""One run, in one process or in the several that accelerate, torchrun or Ray Train has launched."""

from __future__ import annotations

from typing import Any

from grpo.config.run import SftConfig, TrainConfig
from grpo.evaluation.held_out import Result
from grpo.learner.parallel import join
from grpo.policy_source import device_of, with_threads
from grpo.run.stop import ignore_signals
from grpo.sft import sft
from grpo.train import train


def launch(config: SftConfig, **flags: Any) -> Result | None:
    """`quartet train` or `quartet sft`: what the summary shows, None on the ranks that do not show one.

    `flags` are resume, stop_after and force.
    """
    config = with_threads(config, flags.get("resume"))
    ranks = join(device_of(config.device).type == "cpu", config.learner.parallel)
    if not ranks.first:
        ignore_signals()  # rank 0 decides how the run ends
    with ranks.together():
        if isinstance(config, TrainConfig):
            result = train(config, ranks=ranks, **flags)
        else:
            result = sft(config, ranks=ranks, **flags)
    return result if ranks.first else None
