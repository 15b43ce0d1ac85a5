"""One `quartet train` under watch: its processes, what they do at this moment, and what is left when it has ended."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from grpo.run import checkpoint

ROOT = Path(__file__).parents[2]
AWAY_S = 15.0  # after which nothing of a run that has ended may be there
SHARED_MEMORY = Path("/dev/shm")
# With Ray's own names for what an actor does at this moment, as they are in the titles of its process.
TITLES = {"sampling": ".sample", "publishing": ".sync_weights", "measuring": ".measure_costs"}


class Watched:
    """A run, started again with `start` until it has come to its end; all that it ever started is remembered."""

    def __init__(self, folder: Path, options: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        """`environment`: of a run in a cluster that this process has started; None for one that starts its own."""
        self.guest = environment is not None
        self.folder, self.options = folder, options
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(
            tempfile.mkdtemp(prefix="ch-", dir="/tmp")
        )  # Ray's folders are made below it: a short name
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(self.temporary)}
        self.environment = kept | own | (environment or {})
        self.memory_before = set(SHARED_MEMORY.iterdir())
        self.known: dict[int, psutil.Process] = {}
        self.sessions: set[int] = set()
        self.stderr = folder.with_suffix(".stderr")

    def start(self) -> None:
        words = [f"--{name}={value}" for name, value in self.options.items()]
        command = [sys.executable, "-m", "benchmarks.chaos.short", "train", f"--output_dir={self.folder}", *words]
        if (self.folder / "config.yaml").exists():
            command += ["--resume", "auto"]
        with open(self.folder.with_suffix(".stdout"), "ab") as out, open(self.stderr, "wb") as err:
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, stdout=out, stderr=err, start_new_session=True
            )
        self.began = time.time()
        self.sessions.add(self.process.pid)

    def look(self) -> list[psutil.Process]:
        """The living processes below the run, and those of the cluster in which it is a guest."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(None if self.guest else self.process.pid).children(recursive=True):
                self.known.setdefault(process.pid, process)
        return [process for process in self.known.values() if alive(process)]

    @property
    def step(self) -> int:
        """The last one that has its line."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return max((json.loads(line)["step"] for line in lines if "loss/total" in line), default=0)

    @property
    def saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(".step_*.partial"))

    def said(self) -> list[str]:
        return [line for line in self.stderr.read_text().splitlines() if line.startswith("quartet:")]

    def checkpoints(self) -> dict[int, str]:
        """A digest of every checkpoint: all tensors, and the state but for times."""
        return {step: digest(path) for step, path in checkpoint.saved(self.folder / "checkpoints").items()}

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.folder / "events.jsonl").read_text().splitlines())
        return [event for event in lines if event["event"] == kind]

    def metric(self, name: str) -> float:
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return sum(line.get(name) or 0.0 for line in lines)

    def left(self) -> list[str]:
        """What is still there of a run that has ended: processes, ports, shared memory, files of Ray's."""
        deadline = time.monotonic() + AWAY_S
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _left(self) -> list[str]:
        own = {p.pid: p for p in self.known.values() if alive(p)}
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) in self.sessions and alive(process):
                    own[process.pid] = process
        found = [f"process {pid}: {' '.join(title(p))[:80]}" for pid, p in own.items()]
        for process in own.values():
            with suppress(psutil.Error):
                ports = [c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
                found += [f"port {port} of process {process.pid}" for port in ports]
        found += [f"shared memory: {path}" for path in sorted(set(SHARED_MEMORY.iterdir()) - self.memory_before)]
        found += [f"folder: {path}" for path in sorted(self.temporary.iterdir())]
        if not found:
            self.temporary.rmdir()
        return found

    def kill(self) -> None:
        """Everything of a run that has not ended by itself."""
        if self.process.poll() is None:
            own = [] if self.guest else self.look()
            for process in [*own, psutil.Process(self.process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title(process: psutil.Process) -> list[str]:
    try:
        return [word for word in process.cmdline() if word]
    except psutil.Error:
        return []


def digest(path: Path) -> str:
    """Of a checkpoint: all that the next steps depend on, and no times."""
    saved = checkpoint.load(path)
    found = hashlib.sha256()
    for kind in sorted(saved.tensors):
        for name in sorted(saved.tensors[kind]):
            tensor = saved.tensors[kind][name]
            found.update(f"{kind} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    state = {name: part for name, part in saved.state.items() if name not in ("log", "unwritten")}
    found.update(json.dumps(_without_times(state), sort_keys=True).encode())
    return found.hexdigest()


def _without_times(state: Any) -> Any:
    """A batch in flight has metrics, some of which are times."""
    if isinstance(state, list):
        return [_without_times(part) for part in state]
    if not isinstance(state, dict):
        return state
    return {name: _without_times(part) for name, part in state.items() if not str(name).startswith("time/")}
