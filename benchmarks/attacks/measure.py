"""Runs an attack in a process of its own: what it takes of processors and memory, and what it says last."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

LIMIT_S, LIMIT_MB = 30.0, 1500.0  # an attack that takes more (seconds of processors) has succeeded, and is ended
LONGEST_S = 300.0  # by the clock
TREE = Path(__file__).resolve().parents[2]


def _taken(process: psutil.Process) -> tuple[float, float]:
    """Seconds of processors, and MB, that a process and all that it has started have taken and hold."""
    seconds = memory = 0.0
    with suppress(psutil.Error):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                times = each.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
                memory += each.memory_info().rss / 1e6
    return seconds, memory


def attack(arguments: Sequence[str], tree: Path) -> tuple[float, float, float, str]:
    """Seconds of processors, the peak of MB, MB of text on the terminal, and the outcome of a command in `tree`."""
    began, seconds, peak, verdict = time.monotonic(), 0.0, 0.0, ""
    variables = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=tree, env=variables, stdout=said, stderr=said, start_new_session=True
        )
        while process.poll() is None and not verdict:
            time.sleep(0.2)
            used, held = _taken(psutil.Process(process.pid))
            seconds, peak = max(seconds, used), max(peak, held)
            if seconds > LIMIT_S or time.monotonic() - began > LONGEST_S:
                verdict = "NO END"
            elif peak > LIMIT_MB:
                verdict = f"MORE THAN {LIMIT_MB:g} MB"
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        size = said.seek(0, os.SEEK_END)
        said.seek(max(size - 20_000, 0))
        text = said.read().decode(errors="replace")
    raw = "RAW ESC; " if "\x1b" in text else ""
    trace = "TRACEBACK; " if "Traceback (most recent" in text else ""
    last = re.sub(r"\s+", " ", (text.strip().splitlines() or [""])[-1])
    return seconds, peak, size / 1e6, raw + trace + (verdict or f"{process.returncode}: {last!a}"[:110])


def table(attacks: Iterable[tuple[str, Sequence[str]]], tree: Path) -> None:
    """Print a line for each named attack."""
    print("| attack | CPU s | peak MB | text MB | outcome |\n|---|---:|---:|---:|---|")
    for name, arguments in attacks:
        seconds, peak, said, outcome = attack(arguments, tree)
        print(f"| {name} | {seconds:.1f} | {peak:.0f} | {said:.2f} | {outcome.replace('|', '/')} |", flush=True)
