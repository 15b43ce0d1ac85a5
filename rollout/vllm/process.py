"""The vLLM server that we start ourselves: in an environment of its own, on loopback, and never for longer than us."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from select import select
from typing import Any

from rollout.faults import RolloutError
from rollout.vllm.client import Lost

SERVER = Path(__file__).parent / "inside" / "quartet_server.py"
PYTHON = Path(".vllm/bin/python")  # where `make vllm` puts it
INTERPRETER = "QUARTET_VLLM_PYTHON"  # the environment variable that names another one
TOKEN = "QUARTET_VLLM_TOKEN"  # the environment variable of the server's secret
START_S = 60.0  # the server listens before it imports vLLM
END_S = 5.0
TOLD_LINES = 12  # of the log, in an error


def interpreter() -> Path:
    return Path(os.environ.get(INTERPRETER) or PYTHON)


def state_of(python: Path) -> dict[str, Any]:
    """Asks a server with this interpreter what it says of itself. Raises RolloutError where it cannot start."""
    command = [str(python), str(SERVER), "--state"]
    try:
        done = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, timeout=START_S, check=True
        )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        words = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        raise RolloutError(
            f"{python} cannot run vLLM's server: {' '.join(words)}; install it with `make vllm`, or name the "
            f"interpreter of another environment in {INTERPRETER}"
        ) from error


def clean_environment() -> dict[str, str]:
    """Our environment without what is meant for our own interpreter."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", TOKEN)}


class VLLMProcess:
    """A server of our own, with its `url` and `token`. Its log is appended to the file `log`. It sees `gpus`, or all.

    It is in a process group of its own, so that Ctrl-C reaches us alone, and it watches us: if we are killed, it ends.
    Raises Lost, a RolloutError, if it does not listen in time.
    """

    def __init__(
        self, python: Path, log: Path, threads: int, while_waiting: Callable[[], None], gpus: str = ""
    ) -> None:
        self.log, self.token = log, secrets.token_hex(32)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = clean_environment() | {"OMP_NUM_THREADS": str(threads), TOKEN: self.token}
        environment |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        with open(log, "ab") as written:
            self.process = subprocess.Popen(
                [str(python), str(SERVER), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=written,
                env=environment,
                start_new_session=True,
            )
        try:
            self.url = f"http://127.0.0.1:{self._port(while_waiting)}"
        except BaseException:
            self.close()
            raise

    def _port(self, while_waiting: Callable[[], None]) -> int:
        """What it says first."""
        output, deadline = self.process.stdout, time.monotonic() + START_S
        assert output is not None
        while not select([output], [], [], 0.1)[0]:
            while_waiting()
            if time.monotonic() > deadline:
                raise Lost(f"vLLM's server has not started within {START_S:g} s. {self.told()}")
        line = output.readline()
        if not line:
            self.process.wait()
            raise Lost(f"vLLM's server could not start. {self.told()}")
        return int(json.loads(line)["port"])

    def state(self) -> str:
        """Whether it runs, or how it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)  # a connection is cut a moment before the process is gone
        code, named = self.process.poll(), f"its process {self.process.pid}"
        if code is None:
            return f"{named} still runs"
        if code >= 0:
            return f"{named} has ended with status {code}"
        name = signal.Signals(-code).name
        why = ", perhaps since the host had no memory left" if name == "SIGKILL" else ""
        return f"{named} was ended by {name}{why}"

    def told(self) -> str:
        """Tells what is known of its end, for an error."""
        state = self.state()
        with open(self.log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = file.read().decode(errors="replace").splitlines()[-TOLD_LINES:]
        about = f"{state[0].upper()}{state[1:]}; go on with --resume auto. The end of its log, {self.log}:"
        return "\n".join([about, *lines])

    def close(self) -> None:
        """Ends it and all that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        if self.process.stdout:
            self.process.stdout.close()
