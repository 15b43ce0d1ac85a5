"""Starts a script as N ranks on this machine's CPUs, as torchrun would."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence


def start_ranks(command: Sequence[str], size: int = 2) -> list[subprocess.Popen]:
    """The processes. They meet at a port below those that the system gives to connections, so none of these has it."""
    port = random.randrange(20000, 32000)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end_of(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each. None is left."""
    try:
        ended = []
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            ended.append((process.returncode, out, err))
        return ended
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def run_ranks(command: Sequence[str], size: int) -> list[str]:
    """The standard output of each rank. Raises AssertionError with their errors where one fails."""
    ended = end_of(start_ranks(command, size))
    assert [code for code, _, _ in ended] == [0] * size, ended
    return [out for _, out, _ in ended]
