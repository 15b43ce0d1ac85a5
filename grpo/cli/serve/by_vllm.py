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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from grpo.cli.config.serve import ServeConfig
from grpo.run.listening import keep
from grpo.run.memory_errors import phase
from grpo.source.policy_source import find_policy, load_found
from grpo.source.vllm_token import installed_vllm
from grpo.task.check import check_plan
from policies.policy import Policy
from rollout.backends.vllm.process import clean_environment
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


def serve_by_vllm(config: ServeConfig, key: str | None, say: Callable[[str], None]) -> None:
    """Serve until a signal comes. Raises ValueError or RolloutError where vLLM is not installed or cannot start."""
    source = find_policy(config.model)
    check_plan(config, source)
    installed = installed_vllm(config.vllm_python, "vllm_python")
    on_cpu = installed["on_cpu"]
    if not installed["tried"]:
        print(f"nobody has compared the log-probabilities of vLLM {installed['vllm']} with ours", file=sys.stderr)
    kept, address = keep(config.host, config.port)
    with kept, tempfile.TemporaryDirectory(prefix="quartet-serve-") as place:
        folder, log = Path(place) / "policy", Path(place) / "vllm.log"
        policy = load_found(source, config)
        with phase("loading", config):
            policy.save(folder)
        command = arguments(config, policy, folder, int(address.rpartition(":")[2]), on_cpu)
        del policy  # vLLM has its own
        environment = clean_environment() | {"VLLM_NO_USAGE_STATS": "1"}
        if key is not None:
            environment["VLLM_API_KEY"] = key
        if on_cpu:
            environment |= {"OMP_NUM_THREADS": str(config.threads or os.cpu_count() or 1)}
            environment = ON_CPU | environment
        with open(log, "wb") as written:
            server = subprocess.Popen(
                [sys.executable, "-c", ENDS_WITH_US, str(os.getpid()), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                start_new_session=True,  # Ctrl-C reaches us alone
            )
        try:
            _wait(server, f"http://{address}/health", log)
            say(f"{config.called} ({source.meaning}) by vLLM at http://{address}/v1   (Ctrl-C ends it)")
            server.wait()
            raise ValueError(_told("vLLM's server has ended", server, log))
        finally:
            _end(server, config.shutdown_s)


def arguments(config: ServeConfig, policy: Policy, folder: Path, port: int, on_cpu: bool) -> Sequence[str]:
    """The command of vLLM's server."""
    own = {"temperature": config.temperature, "max_new_tokens": config.max_completion_tokens}
    given = {
        "model": str(folder),
        "served-model-name": config.called,
        "host": config.host,
        "port": str(port),
        "dtype": config.dtype,
        "max-model-len": str(policy.max_length),
        "max-num-seqs": str(config.max_batch_size),
        "generation-config": "vllm",
        "override-generation-config": json.dumps(own),
    }
    if on_cpu:
        given["kv-cache-memory-bytes"] = str(KV_CACHE_BYTES)
        given["compilation-config"] = json.dumps({"custom_ops": ["-rotary_embedding"]})
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    module = "vllm.entrypoints.openai.api_server"  # vllm-cpu's command `vllm` looks for a package of another name
    return [str(config.vllm_python.absolute()), "-m", module, *words, *(["--enforce-eager"] if on_cpu else [])]


def _wait(server: subprocess.Popen, health: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        if server.poll() is not None:
            raise ValueError(_told("vLLM's server could not start", server, log))
        with suppress(OSError), urllib.request.urlopen(health, timeout=5):
            return
        if time.monotonic() > deadline:
            raise ValueError(_told(f"vLLM's server does not answer after {START_S:g} s", server, log))
        time.sleep(0.5)


def _told(what: str, server: subprocess.Popen, log: Path) -> str:
    """With the first error in its log, which others follow, or else the log's end."""
    said = log.read_text(errors="replace").splitlines()
    errors = (
        [line for line in said if " ERROR " in line and re.search(r"\b\w+(Error|Exception)\b", line)]
        or said[-12:]
        or ["nothing"]
    )
    return f"{what} (status {server.poll()}): {errors[0][:2000]}"


def _end(server: subprocess.Popen, seconds: float) -> None:
    """Running requests have so many seconds."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(patience)
