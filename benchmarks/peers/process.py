"""One process of a comparison: it has a limit of time, and the memory of its whole tree is watched."""

from __future__ import annotations

import atexit
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LOOKS_S = 0.1  # between two looks at the memory
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}


@dataclass
class Ended:
    """What became of a process. `code` is None where the limit ended it, and negative where a signal did."""

    code: int | None
    seconds: float
    said: str
    peak_rss_bytes: int

    @property
    def last_line(self) -> str:
        return (self.said.strip().splitlines() or [""])[-1].strip()


class Started:
    """A process with a session of its own, so that its whole tree can be watched and ended."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        chosen = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        atexit.register(self.stop)  # when the comparison itself is interrupted
        self.began = time.perf_counter()
        self.peak = 0
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=os.environ | ENVIRONMENT | chosen | dict(environment or {}),
            start_new_session=True,
        )

    def look(self) -> bool:
        """Whether it still runs; the memory of its tree is noted. Pages that two processes share count twice."""
        with suppress(psutil.Error):
            top = psutil.Process(self.process.pid)
            resident = 0
            for one in (top, *top.children(recursive=True)):
                with suppress(psutil.Error):
                    resident += one.memory_info().rss
            self.peak = max(self.peak, resident)
        return self.process.poll() is None

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Wait until it has ended, or until `until()` holds. Returns False where the limit came first."""
        limit = time.perf_counter() + seconds
        while self.look() and not (until and until()):
            if time.perf_counter() > limit:
                return False
            time.sleep(LOOKS_S)
        return True

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT to every process of the group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> Ended:
        """End what still runs of it, the processes that it left behind included."""
        code = self.process.poll()
        self.stop()
        atexit.unregister(self.stop)
        seconds = time.perf_counter() - self.began
        self.log.seek(0)
        said = self.log.read()
        self.log.close()
        return Ended(code, seconds, said, self.peak)


def run(command: Sequence[str | Path], seconds: float, **named: object) -> Ended:
    """Run it to its end, or for so many seconds."""
    started = Started(command, **named)  # type: ignore[arg-type]
    try:
        started.wait(seconds)
    finally:
        ended = started.end()
    return ended


def module(name: str, *words: str | Path) -> list[str]:
    """The command of a module of this package in an interpreter like ours."""
    return [sys.executable, "-m", f"benchmarks.peers.{name}", *map(str, words)]


def clean(text: str, *folders: Path) -> str:
    """A text without the paths of this machine and the addresses that an installer spoke to."""
    for folder in sorted({ROOT, Path(sys.prefix), Path(sys.base_prefix), *folders}, key=lambda f: -len(str(f))):
        text = text.replace(str(folder.resolve()), "…").replace(str(folder), "…")
    for folder in folders:  # as its files are named in a message
        text = text.replace(folder.name, "FOLDER")
    text = re.sub(rf"\b(host|on) {re.escape(platform.node())}\b", r"\1 HOST", text)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"\bhttps?://\S+", "URL", text)
    return re.sub(r"(?<![\w…])/(?:[\w.+-]+/)+", ".../", text)
