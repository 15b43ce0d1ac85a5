"""Starts a script as N ranks on this machine's CPUs, as torchrun would."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence


def run_ranks(command: Sequence[str], size: int, timeout: float = 300) -> list[str]:
    """The standard output of each rank. Raises AssertionError with their errors where one fails; none is left."""
    port = random.randrange(20000, 32000)  # below those that the system gives to connections
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
        assert [process.returncode for process in processes] == [0] * size, ended
        return [out for out, _ in ended]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
