"""`quartet serve --backend vllm` starts vLLM's own server of OpenAI's API, with the policy, in its own environment.

The policy is saved in transformers' format to a folder that vLLM reads, and the server ends with this process. Every
fault of vLLM on a CPU that changes log-probabilities silently is avoided or does not come up, since nothing is
published and nothing drafts (rollout/backends/vllm/inside/quartet_bypasses.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.config.serve import SHUTDOWN_S, ServeConfig
from grpo.run.listening import find_address
from grpo.source.vllm_token import installed_vllm
from rollout.backends.vllm.process import clean_environment, interpreter
from rollout.backends.vllm.settings import KV_CACHE_BYTES

ON_CPU = {  # where the environment has no others
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_MLA_DISABLE": "1",  # its MLA kernel for CPUs takes latents of 512 + 64 only
}
START_S = 600.0  # vLLM imports itself, loads the model and measures its memory
ENDS_WITH_US = (  # run by the child: the kernel is to end it when we are gone, also where we are killed
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


class ServerOfVLLM:
    """Starts vLLM's server with the policy of `config`. Raises ValueError or RolloutError where there is no vLLM."""

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.use = config, PolicyInUse(config)
        self.installed = installed_vllm()
        if not self.installed["tried"]:
            version = self.installed["vllm"]
            print(f"nobody has compared the log-probabilities of vLLM {version} with ours", file=sys.stderr)

    def serve(self, key: str | None, say: Callable[[str], None]) -> None:
        """Serve until a signal comes. Raises ValueError where the server cannot start, or has ended by itself."""
        address = find_address(self.config.host, self.config.port)
        with tempfile.TemporaryDirectory(prefix="quartet-serve-") as place:
            self.log = Path(place) / "vllm.log"
            command = self._save(Path(place) / "policy", int(address.rpartition(":")[2]))
            with open(self.log, "wb") as file:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", ENDS_WITH_US, str(os.getpid()), *command],
                    env=self._environment(key),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,  # Ctrl-C reaches us alone
                )
            try:
                self._wait(f"http://{address}/health")
                meaning = self.use.source.meaning
                say(f"{self.config.called} ({meaning}) by vLLM at http://{address}/v1   (Ctrl-C ends it)")
                self.process.wait()
                raise self._failed("vLLM's server has ended")
            finally:
                self._end()

    def _save(self, folder: Path, port: int) -> list[str]:
        """Write the policy to this folder. Returns the command of the server that reads it there."""
        config, policy = self.config, self.use.load()
        with self.use.phase("loading"):
            policy.save(folder)
        sampling = {"temperature": config.rollout.temperature, "max_new_tokens": config.rollout.max_completion_tokens}
        options = {
            "model": str(folder),
            "served-model-name": config.called,
            "host": config.host,
            "port": str(port),
            "dtype": config.dtype,
            "max-model-len": str(policy.max_length),
            "max-num-seqs": str(config.max_batch_size),
            "generation-config": "vllm",
            "override-generation-config": json.dumps(sampling),
        }
        if self.installed["on_cpu"]:
            options["kv-cache-memory-bytes"] = str(KV_CACHE_BYTES)
            options["compilation-config"] = json.dumps({"custom_ops": ["-rotary_embedding"]})
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        module = "vllm.entrypoints.openai.api_server"  # vllm-cpu's command `vllm` looks for a package of another name
        eager = ["--enforce-eager"] if self.installed["on_cpu"] else []
        return [str(interpreter().absolute()), "-m", module, *words, *eager]

    def _environment(self, key: str | None) -> dict[str, str]:
        environment = clean_environment() | {"VLLM_NO_USAGE_STATS": "1"}
        if key is not None:
            environment["VLLM_API_KEY"] = key
        if self.installed["on_cpu"]:
            environment["OMP_NUM_THREADS"] = str(self.config.threads or os.cpu_count() or 1)
            environment = ON_CPU | environment
        return environment

    def _wait(self, health: str) -> None:
        """Returns as soon as the server answers."""
        deadline, opener = time.monotonic() + START_S, urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            if self.process.poll() is not None:
                raise self._failed("vLLM's server could not start")
            with suppress(OSError), opener.open(health, timeout=5):
                return
            if time.monotonic() > deadline:
                raise self._failed(f"vLLM's server does not answer after {START_S:g} s")
            time.sleep(0.5)

    def _failed(self, what: str) -> ValueError:
        """Returns the error with the first one of the log, which others follow, or else with its end."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if " ERROR " in line and re.search(r"\b\w+(Error|Exception)\b", line)]
        [first, *_] = errors or lines[-12:] or ["nothing"]
        return ValueError(f"{what} (status {self.process.poll()}): {first[:2000]}")

    def _end(self) -> None:
        """End the server. Running requests have SHUTDOWN_S seconds."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number, patience in ((signal.SIGTERM, SHUTDOWN_S), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
