"""Private folders of processes that may be killed: what they leave, and what still runs with it, is removed.

Run as a program with a folder, this waits until its standard input ends. That is when the process which has started it
is gone, in whatever way. It needs neither torch nor Ray, and stays small.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

LOCK = "lock"  # the file in such a folder that the process which has made it keeps locked
TOKEN = "token"  # the file in it that RAY_AUTH_TOKEN_PATH names in the processes that belong to it
TIMES, PAUSE_S = 50, 0.2


def take_lock(file: IO[str]) -> bool:
    """Takes the lock of an open file, which the system gives back when this process ends; whether it was free."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # there is none on Windows
        return False
    return True


def _processes(folder: Path) -> Iterator[psutil.Process]:
    """Finds the processes that have the folder's token, or name the folder in their command."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            named = process.pid != os.getpid() and any(str(folder) in word for word in process.cmdline())
            if named or process.environ().get("RAY_AUTH_TOKEN_PATH") == str(folder / TOKEN):
                yield process


def remove(folder: Path) -> None:
    """Kill what belongs to the folder, which would make it again, and delete it."""
    for _ in range(TIMES):
        alive = [process for process in _processes(folder) if process.status() != psutil.STATUS_ZOMBIE]
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        if not alive:
            break
        time.sleep(PAUSE_S)
    shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(place: Path, prefix: str) -> None:
    """Remove the folders in `place` whose processes were killed together with the program that watched them."""
    for path in place.glob(f"{prefix}*/{LOCK}"):
        with suppress(OSError), open(path) as file:  # perhaps somebody else's
            if take_lock(file):
                remove(path.parent)


if __name__ == "__main__":
    sys.stdin.read()
    folder = Path(sys.argv[1])
    if folder.exists():
        remove(folder)
