"""Run by test_parallel.py as N ranks without a model: one of them ends, and each prints with what error it ends.

python failing_ranks.py HOW VICTIM      with RANK and WORLD_SIZE set; HOW is `raise` or `kill`
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

from grpo.config.learner import ParallelOptions
from grpo.learner.parallel import RankFailed, join


def main(how: str, victim: int) -> None:
    ranks = join(True, ParallelOptions())
    with ranks.together():
        dist.all_reduce(torch.ones(10))
        if ranks.rank == victim and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == victim:
            raise KeyError("of one rank")
        dist.all_reduce(torch.ones(10))


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except (KeyError, RankFailed) as error:
        print(f"{type(error).__name__}: {error}")
