"""How long the page of a large run takes to open, and how much memory its server needs.

Runs of 100 and of 1,000 steps with 512 completions each are made up from one recorded step. Each is served twice: the
first time its index has to be built, which goes on while the page is used. Prints the seconds from the start of the
command to its address, then those of the first overview, of a step, of a group and of a search, and the memory.

    python -m benchmarks.view --json benchmarks/results/view.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import zstandard

from grpo.run import hardware
from grpo.run.records import read_metrics, read_rollouts, rollout_path

RECORDED = Path(__file__).parents[1] / "tests/cases/run_to_view"
COMPLETIONS, GROUP = 512, 8


def make_up(folder: Path, steps: int) -> None:
    """A run whose every step has the completions of the recorded one many times over."""
    (folder / "rollouts").mkdir(parents=True)
    lines, compressor = read_rollouts(RECORDED, 2), zstandard.ZstdCompressor()
    row = read_metrics(RECORDED)[2]
    with open(folder / "metrics.jsonl", "w") as metrics:
        for step in range(1, steps + 1):
            metrics.write(json.dumps(row | {"step": step}) + "\n")
            record = []
            for i in range(COMPLETIONS):
                group = i // GROUP
                more = {"sample": i % GROUP, "prompt_id": f"{(step * 64 + group) % 7473}"}
                record.append(
                    json.dumps(lines[i % len(lines)] | more | {"text": f"{lines[i % 16]['text']} {step}.{i}"})
                )
            rollout_path(folder, step).write_bytes(compressor.compress("\n".join(record).encode() + b"\n"))
    (folder / "events.jsonl").touch()


def measure(folder: Path, last: int) -> dict[str, float]:
    began = time.perf_counter()
    command = [sys.executable, "-m", "grpo", "view", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    found = {"address_s": time.perf_counter() - began}
    address, token = re.search(r"open (\S+)/\?token=(\S+)", said).groups()  # type: ignore[union-attr]

    def ask(path: str) -> Any:
        request = urllib.request.Request(f"{address}/api/{path}", headers={"x-token": token})
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.loads(response.read())

    def timed(name: str, path: str) -> None:
        start = time.perf_counter()
        ask(path)
        found[f"{name}_s"] = time.perf_counter() - start

    timed("overview", "0/overview")
    found["open_s"] = time.perf_counter() - began
    timed("step", f"0/step/{last}")
    timed("group", f"0/group/{last}/3")
    while (state := ask("0/index"))["indexed"] < state["recorded"]:
        time.sleep(0.2)
    found["indexed_s"] = time.perf_counter() - began
    timed("search", f"0/search?text={last}.17")
    timed("prompts", "0/prompts")
    found["memory_mib"] = psutil.Process(process.pid).memory_info().rss / 2**20
    process.send_signal(signal.SIGINT)
    process.wait(30)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place  # where indices are kept
        for steps in options.steps:
            folder = Path(place) / f"run_{steps}"
            make_up(folder, steps)
            for time_of in ("first", "second"):
                name = f"{steps} steps, {time_of} time"
                results[name] = found = measure(folder, steps)
                print(name, "  ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
    if options.json:
        found = {"environment": hardware.describe(), "results": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
