"""A pool of worker processes, which are killed at a time limit.

Workers are started when first needed, by a fresh interpreter (without a fork and without the caller's `__main__`), in a
session of their own. A worker that answers late or dies is killed with everything it started, and replaced. Only a
process that a reward has put into another session (`start_new_session=True`) escapes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from rewards.isolation.child import LoadedReward, load, plain
from rewards.isolation.output import Output
from rewards.isolation.replies import MOST_BYTES, BadReply, read_reply
from rewards.isolation.variables import hint_at_withheld, worker_variables
from rewards.opened import opened_by
from rewards.protocol import RewardError, Signature

START_TIMEOUT_S = 120.0  # a user's file may import heavy libraries
GRACE_S = 1.0  # a late worker has so long to end itself and leave a trace before it is killed

# Windows has no groups of processes, and hands no open socket to a process.
ISOLATES = hasattr(os, "killpg")

_ROOT = str(Path(__file__).parents[2])  # it comes first for a moment: a user's file may be called rewards.py
_BOOT = (
    "import json, sys; path = json.loads(sys.argv[1]); sys.path[:] = [sys.argv.pop(2), *path]; "
    "from rewards.isolation.child import serve; sys.path[:] = path; serve(*map(int, sys.argv[2:]))"
)


class WorkerProcess:
    """One child process and the socket to it. `job` is the index of the request that it works on, if any."""

    def __init__(self, output: Output, pass_variables: Sequence[str] = (), memory: int = 0) -> None:
        self.socket, theirs = socket.socketpair()
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        fds = (theirs.fileno(), self._trace.fileno())
        path = [folder or os.getcwd() for folder in sys.path]
        defaults = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # the order of sets: the same in all workers
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-c", _BOOT, json.dumps(path), _ROOT, *map(str, fds), str(memory)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=defaults | worker_variables(pass_variables),
        )
        theirs.close()
        self.pid = self._process.pid
        assert self._process.stdout is not None
        output.follow(self._process.stdout)
        self.ready = False
        self.served = 0
        self.job: int | None = None
        self._request: dict = {"number": 0}
        self._buffer = bytearray()

    def ask(self, request: dict, timeout_s: float, limits: int = 1) -> None:
        """Send a request, which may take `limits` times as long if the worker begins its time anew. Raises OSError if
        the worker has died, or has written something unasked."""
        self.timeout_s = timeout_s
        if wait([self.socket], 0):
            raise OSError
        self._request = request | {"timeout_s": timeout_s, "number": self._request["number"] + 1}
        self.socket.settimeout(timeout_s)
        self.socket.sendall(json.dumps(self._request).encode() + b"\n")
        self.asked = time.monotonic()
        self.deadline = self.asked + timeout_s * limits + GRACE_S

    def receive(self) -> dict | None:
        """The reply; None while it is incomplete. Raises EOFError if the worker has died, BadReply for no reply."""
        try:
            chunk = self.socket.recv(1 << 20)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            raise EOFError
        self._buffer += chunk
        if len(self._buffer) > MOST_BYTES:
            raise BadReply(f"more than {MOST_BYTES >> 20} MiB")
        if not chunk.endswith(b"\n"):
            return None
        reply = read_reply(self._buffer, self._request)
        self._buffer.clear()
        self.served += 1
        return reply

    def stop(self) -> None:
        """Kill the process and all that it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def kill(self, late: bool = False, wrote: str = "") -> dict:
        """Stop the worker and free its files. Returns the failure of its request, `timeout` or `died`.

        `wrote` says what it has written in place of an answer.
        """
        self.stop()
        trace = os.pread(self._trace.fileno(), 1 << 16, 0).decode(errors="replace")
        self.socket.close()
        self._trace.close()
        if wrote:
            return {
                "kind": "died",
                "message": f"its process was ended: it wrote no answer into its socket, but {wrote}",
            }
        if late or trace:
            message = f"no result after {self.timeout_s:g} s{stuck_at(trace)}"
            return {"kind": "timeout", "message": message}
        code = self._process.returncode
        cause = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
        return {"kind": "died", "message": f"the process that ran it ended ({cause})"}


def stuck_at(trace: str) -> str:
    """Tells where a worker was when its time was over: the innermost line of a reward in faulthandler's dump."""
    frames = re.findall(r'File "(.+)", line (\d+) in (.+)', trace.split("\n\n")[-1])  # the main thread comes last
    libraries = (os.path.dirname(os.__file__), *(str(folder) for folder in sys.path if "-packages" in folder))
    frames = [frame for frame in frames if not frame[0].startswith(("<", *libraries))] or frames
    return f", stuck at {Path(frames[0][0]).name}:{frames[0][1]} in {frames[0][2]}" if frames else ""


class WorkerPool:
    """Runs requests on up to `size` workers. Several threads may call it; one call runs at a time.

    `memory` limits the bytes of data of each worker (RLIMIT_DATA) in whole MiB; beyond it a function gets a
    MemoryError.
    """

    def __init__(
        self,
        functions: list[dict],
        *,
        size: int,
        timeout_s: float,
        pass_variables: Sequence[str] = (),
        memory: int = 0,
    ) -> None:
        if not ISOLATES:
            raise RewardError(
                "tools, environments and agents run in processes of their own, which quartet makes on Linux and macOS "
                "alone; on Windows use WSL 2"
            )
        self._functions, self._size, self._timeout_s = functions, size, timeout_s
        self._pass_variables, self._memory = pass_variables, memory
        self._workers: list[WorkerProcess] = []
        self._signatures: list[dict] = []
        self._lock = threading.Lock()
        self._closed = False
        self._lost: list[float] = []
        self._output = Output()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in list(self._workers)]

    def take_lost(self) -> list[float]:
        """Gives when the requests began whose workers died or were late since the last call, in time.monotonic()."""
        lost, self._lost = self._lost, []
        return lost

    def signatures(self) -> list[Signature]:
        """Load the functions in one worker. Raises RewardError if one of them cannot be loaded."""
        self.run([])
        names = ("required", "optional")
        try:
            return [Signature(**s | {name: tuple(s[name]) for name in names}) for s in self._signatures]
        except (TypeError, KeyError) as error:
            raise RewardError(f"a file of rewards has written into its worker's socket: {error!r}") from error

    def run(
        self,
        requests: Sequence[dict],
        *,
        stop_at_failure: bool = False,
        on_reply: Callable[[int], None] = lambda request: None,
    ) -> list[dict | None]:
        """One reply per request: the worker's, or `{"kind": "timeout" | "died", "message": ...}`.

        A request may begin its time limit anew, as often as its key `limits` says.

        With `stop_at_failure` the requests that were not answered before the first failure stay None. `on_reply` is
        called with the place of each request that was answered.
        """
        replies: list[dict | None] = [None] * len(requests)
        told: set[int] = set()
        waiting = deque(range(len(requests)))
        with self._lock:
            self._output.begin_call()
            try:
                while self._start_workers(len(waiting)) or waiting or self._busy():
                    self._dispatch(requests, waiting, replies)
                    self._collect(replies)
                    for place in [i for i, reply in enumerate(replies) if reply is not None and i not in told]:
                        told.add(place)
                        on_reply(place)
                    if stop_at_failure and any(reply is not None and "kind" in reply for reply in replies):
                        break
            finally:  # after an error, Ctrl-C or a stop, no late answer may reach the next request
                for worker in self._busy():
                    self._drop(worker)
        return replies

    def close(self) -> None:
        """End all workers; a `run` that waits in another thread raises RewardError."""
        self._closed = True
        for worker in list(self._workers):
            worker.stop()
        with self._lock:
            for worker in list(self._workers):
                self._drop(worker)
        self._output.finish()

    def _busy(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.job is not None or not worker.ready]

    def _start_workers(self, num_waiting: int) -> bool:
        """Start the workers that the waiting requests need. True while no worker is ready."""
        if self._closed:
            raise RewardError("these processes of rewards, tools or agents were closed; make new ones")
        jobs = num_waiting + sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(self._size, max(jobs, 1)):
            worker = WorkerProcess(self._output, self._pass_variables, self._memory)
            self._workers.append(worker)
            try:
                worker.ask({"functions": self._functions}, START_TIMEOUT_S)
            except OSError as error:
                why = f"{self._drop(worker)['message']}{self._limit()}"
                raise RewardError(f"a worker for rewards, tools or agents cannot start: {why}") from error
        return not any(worker.ready for worker in self._workers)

    def _dispatch(self, requests: Sequence[dict], waiting: deque[int], replies: list[dict | None]) -> None:
        for worker in list(self._workers):
            if not waiting or worker.job is not None or not worker.ready:
                continue
            worker.job = waiting[0]
            try:
                request = requests[worker.job]
                worker.ask(request, self._timeout_s, request.get("limits", 1))
            except OSError:  # it died while idle; another worker gets the request, unless this one has never served any
                verdict = self._lose(worker)
                if worker.served <= 1:
                    replies[waiting.popleft()] = verdict
            else:
                waiting.popleft()

    def _collect(self, replies: list[dict | None]) -> None:
        """Wait for the next answer or deadline, and note what happened."""
        busy = self._busy()
        if not busy:
            return
        remaining = min(worker.deadline for worker in busy) - time.monotonic()
        readable = wait([worker.socket for worker in busy], max(0.0, remaining))
        for worker in busy:
            job = worker.job
            if worker.socket in readable:
                try:
                    reply = worker.receive()
                except EOFError:
                    reply = self._lose(worker)
                except BadReply as error:
                    reply = self._lose(worker, wrote=str(error))
            else:
                reply = None
            if reply is None and time.monotonic() >= worker.deadline:
                reply = self._lose(worker, late=True)
            if reply is None:
                continue
            worker.job = None
            for field in reply.keys() & {"message", "error"}:
                reply[field] = hint_at_withheld(reply[field], self._pass_variables)
            if job is not None:
                replies[job] = reply
            elif "signatures" in reply:
                worker.ready, self._signatures = True, reply["signatures"]
            else:
                names = ", ".join(function["function"] for function in self._functions)
                raise RewardError((reply.get("error") or f"loading {names} failed: {reply['message']}") + self._limit())

    def _limit(self) -> str:
        return f"; it may need more memory than program_memory_mb={self._memory >> 20}" if self._memory else ""

    def _lose(self, worker: WorkerProcess, late: bool = False, wrote: str = "") -> dict:
        self._lost.append(worker.asked)
        return self._drop(worker, late, wrote)

    def _drop(self, worker: WorkerProcess, late: bool = False, wrote: str = "") -> dict:
        self._workers.remove(worker)
        return worker.kill(late, wrote)


class ThisProcess:
    """A pool without processes, isolation and time limits, to debug a reward or to compare its scores."""

    def __init__(self, functions: list[dict]):
        self._descriptions = functions
        self._functions: list[LoadedReward] = []

    def signatures(self) -> list[Signature]:
        """Load the functions. Raises RewardError if one of them cannot be loaded."""
        if error := load(self._descriptions, self._functions).get("error"):
            raise RewardError(error)
        return [function.signature for function in self._functions]

    def run(self, requests: Sequence[dict], *, stop_at_failure: bool = False) -> list[dict | None]:
        """One reply per request, as a worker gives it. `stop_at_failure` has no effect."""
        replies: list[dict | None] = []
        for request in requests:
            request = json.loads(json.dumps(request))  # as between processes, no list is shared
            with opened_by(self._descriptions[request["function"]]["function"]):
                reply = self._functions[request["function"]].call(request)
            replies.append(json.loads(json.dumps(reply, default=plain)))
        return replies

    def take_lost(self) -> list[float]:
        return []

    def close(self) -> None:
        self._functions.clear()
