"""Starts a script, or a function, as N ranks on this machine's CPUs, as torchrun would."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from copies import Copy
from torch.distributed import TCPStore


def meeting(size: int) -> tuple[TCPStore, dict[str, str]]:
    """Where ranks meet, on a port that nobody else can have, and the variables that say so. It ends with the store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, shared | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}


def start_ranks(command: Sequence[str], size: int = 2) -> list[subprocess.Popen]:
    """They are copies of this process, which need not import torch for 5 s; where there is a GPU, which a copy cannot
    use, they are fresh interpreters."""
    start = subprocess.Popen if torch.cuda.is_available() else Copy
    store, shared = meeting(size)
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    processes = [
        start(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    processes[0].store = store  # it ends with them
    return processes


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


def results_of_ranks(function: Callable[..., Any], *arguments: Any, size: int = 2) -> list[Any]:
    """What `function` returns on each rank; ranks wait for each other in it. They are copies, too; where there is a
    GPU, for which autograd has threads, they begin anew."""
    _store, shared = meeting(size)
    with multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork").Pool(size) as pool:
        return pool.starmap(_be_rank, [(rank, shared, function, arguments) for rank in range(size)], chunksize=1)


def _be_rank(rank: int, shared: Mapping[str, str], function: Callable[..., Any], arguments: tuple) -> Any:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a test before that was alone in this process
    os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return function(*arguments)
