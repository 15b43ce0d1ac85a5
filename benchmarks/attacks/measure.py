"""Runs an attack in a process of its own: how long it took, how much memory it held, and what it said last."""

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

LIMIT_S, LIMIT_MB = 30.0, 4000.0  # an attack that goes further has succeeded, and is ended
TREE = Path(__file__).resolve().parents[2]


def _memory(process: psutil.Process) -> float:
    """MB that a process and all that it has started hold."""
    total = 0
    with suppress(psutil.Error):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += each.memory_info().rss
    return total / 1e6


def attack(arguments: Sequence[str], tree: Path) -> tuple[float, float, float, str]:
    """Seconds, the peak of MB, MB of text that reached the terminal, and the outcome of a Python command in `tree`."""
    began, peak, verdict = time.monotonic(), 0.0, ""
    variables = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=tree, env=variables, stdout=said, stderr=said, start_new_session=True
        )
        while process.poll() is None and not verdict:
            time.sleep(0.05)
            peak = max(peak, _memory(psutil.Process(process.pid)))
            if time.monotonic() - began > LIMIT_S:
                verdict = f"NO END within {LIMIT_S:g} s"
            elif peak > LIMIT_MB:
                verdict = f"MORE THAN {LIMIT_MB:g} MB"
        seconds = time.monotonic() - began
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
    print("| attack | seconds | peak MB | text MB | outcome |\n|---|---:|---:|---:|---|")
    for name, arguments in attacks:
        seconds, peak, said, outcome = attack(arguments, tree)
        print(f"| {name} | {seconds:.1f} | {peak:.0f} | {said:.2f} | {outcome.replace('|', '/')} |", flush=True)
