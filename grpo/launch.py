"""One run, in one process or in the several that accelerate has launched."""

from __future__ import annotations

from typing import Any

from grpo.config.run import SftConfig, TrainConfig
from grpo.follower import follow
from grpo.learner.parallel import Team, join
from grpo.loader import device_of
from grpo.run.threads import with_threads
from grpo.sft import sft
from grpo.train import Trainer


def launch(config: SftConfig, **flags: Any) -> dict[str, Any] | None:
    """`quartet train` or `quartet sft`: what the summary shows, None on the ranks that only help to learn.

    `flags` are resume, stop_after and force.
    """
    config = with_threads(config, flags.get("resume"))
    ranks = join(cpu=device_of(config.device).type == "cpu")
    if isinstance(ranks, Team) and ranks.rank:
        follow(config, ranks)
        return None
    with ranks.leading():
        if isinstance(config, TrainConfig):
            return Trainer(config, ranks=ranks, **flags).run()
        return sft(config, ranks=ranks, **flags)
