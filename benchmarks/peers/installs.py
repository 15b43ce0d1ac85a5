"""Every other peer is really installed, each in an environment of its own below .peers/, as far as it goes on a CPU.

What is tried is what its own documentation says for pip. Then its package is imported, its GRPO is asked for its
help, and where it gave that and `step` names a script, a step is tried. The environment is deleted afterwards: a result
of this page is what happened, not a working peer.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.process import ROOT, Ended, clean, run
from benchmarks.peers.sizes import Step

FOLDER = ROOT / ".peers"
MOST_BYTES = 12 * 2**30  # of one environment
LINES = 12  # of an error


@dataclass(frozen=True)
class Peer:
    """`asks` is the command of its documentation that trains, asked for its help. `step` is a script of this folder
    that tries a step by that command, with a model."""

    name: str
    requirement: str
    package: str
    asks: tuple[str, ...]
    advice: str
    imports: str = ""
    step: str = ""


PEERS = (
    Peer(
        "TRL with vLLM",
        "trl[vllm]",
        "trl",
        ("-c", "from trl.import_utils import is_vllm_available as a; import vllm; assert a(); vllm.LLM"),
        "TRL's vLLM guide: pip install trl[vllm], then GRPOConfig(use_vllm=True)",
        "vllm",
    ),
    Peer(
        "verl",
        "verl[verl-core]",
        "verl",
        ("-m", "verl.trainer.main_ppo", "--help"),
        "verl's package: pip install verl[verl-core] (its extra cpu adds a torch with CUDA), then python3 -m "
        "verl.trainer.main_ppo with trainer.device=cpu",
        step="verl_step.py",
    ),
    Peer(
        "SkyRL",
        "skyrl[fsdp]",
        "skyrl",
        ("-m", "skyrl.train.entrypoints.main_base", "--help"),
        "SkyRL's installation page: uv sync --extra fsdp in a clone; pip is asked for the same extra of its release",
    ),
    Peer(
        "prime-rl",
        "prime-rl @ git+https://github.com/PrimeIntellect-ai/prime-rl",
        "prime-rl",
        ("-m", "prime_rl.entrypoints.rl", "--help"),
        "prime-rl's README: a clone and uv sync; there is no release, so pip is given the repository",
        "prime_rl",
    ),
)


def tail(ended: Ended, folder: Path) -> str:
    lines = [line.rstrip() for line in clean(ended.said, folder).splitlines() if line.strip()]
    return "\n".join(line[:300] for line in lines[-LINES:])


def attempt(peer: Peer, seconds: float) -> dict[str, Any]:
    """Install, import and ask; the first stage that fails is `failed_at`, with the last lines of what it said."""
    folder = FOLDER / peer.name.lower().replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    stages: list[tuple[str, list[str | Path], float]] = [
        ("venv", [sys.executable, "-m", "venv", folder], 60),
        ("install", [*pip, "install", "--progress-bar", "off", peer.requirement], seconds),
        ("import", [python, "-c", f"import {peer.imports or peer.package}"], 60),
        ("start", [python, *peer.asks], 60),
        *([("step", [python, Path(__file__).with_name(peer.step), ROOT / Step.model], 120.0)] if peer.step else []),
    ]
    found: dict[str, Any] = {"requirement": peer.requirement, "advice": peer.advice, "seconds": {}}
    began = time.perf_counter()
    try:
        for stage, command, limit in stages:
            ended = run(command, limit, environment={"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"})
            found["seconds"][stage] = round(ended.seconds, 1)
            if stage == "install" and ended.code == 0:
                found |= {"version": version(peer.package, folder), "gigabytes": size(folder)}
            if ended.code != 0:
                why = f"ended after {limit:.0f} s" if ended.code is None else f"exit code {ended.code}"
                found |= {"failed_at": stage, "why": why, "last_lines": tail(ended, folder)}
                if stage == "install":
                    found["gigabytes"] = size(folder)
                break
            if stage == "install" and found["gigabytes"] * 1e9 > MOST_BYTES:
                found |= {"failed_at": stage, "why": f"more than {MOST_BYTES / 2**30:.0f} GiB", "last_lines": ""}
                break
            found["reached"] = stage
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["seconds"]["all"] = round(time.perf_counter() - began, 1)
    return found


def version(package: str, folder: Path) -> str:
    [said] = [run([folder / "bin/python", "-m", "pip", "show", package], 60, environment={"PYTHONPATH": ""}).said]
    return next((line.split(": ")[1] for line in said.splitlines() if line.startswith("Version: ")), "unknown")


def size(folder: Path) -> float:
    return round(sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)


def attempts(seconds: float) -> dict[str, dict[str, Any]]:
    found = {}
    for peer in PEERS:
        found[peer.name] = attempt(peer, seconds)
        print(f"{peer.name}: {json.dumps(found[peer.name])}", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    return found


if __name__ == "__main__":
    attempts(float(sys.argv[1]) if len(sys.argv) > 1 else 300)
