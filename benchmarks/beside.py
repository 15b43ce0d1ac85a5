"""How much slower is a run beside one other busy process? The bar: with the defaults at most 2.5 times.

Short runs of the demo (`quartet train examples/01_demo.yaml`: a warm start, then GRPO), alone and beside a process that
only counts, in turn. The rows differ in the number of threads and in how OpenMP's threads wait for each other:

    default            nothing is set: our number of threads, our way to wait (policies/openmp.py, grpo/run/hardware.py)
    N threads          N threads, waiting as the row says: libgomp's own default, not at all (passive), or our way

The machine must be quiet otherwise.

    python benchmarks/beside.py --json beside.json
    taskset -c 0,1 python benchmarks/beside.py --threads 1 2 --repeats 3
    python benchmarks/beside.py --threads --width 640 --warm_start_steps 4 --steps 2 --prompts 4     # 23 M parameters
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from policies.openmp import CHOICES, WAITING

BAR = 2.5
ROOT = Path(__file__).parents[1]
OF_LIBGOMP = {"GOMP_SPINCOUNT": "300000"}  # its default, said aloud, so that ours does not replace it
WAYS = {"libgomp's default": OF_LIBGOMP, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "ours": WAITING}


@contextmanager
def busy() -> Iterator[None]:
    """One other process that wants a core all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(variables: dict[str, str], words: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the warm start, and of one GRPO step (the median). Raises CalledProcessError when the run fails."""
    kept = {k: v for k, v in os.environ.items() if k not in (*CHOICES, "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "grpo", "train", str(ROOT / "examples/01_demo.yaml"), "--output_dir", str(out)]
        command += ["--warm_start.steps", str(options.warm_start_steps), "--steps", str(options.steps)]
        command += ["--prompts_per_step", str(options.prompts), "--rollout.workers", str(options.workers)]
        command += ["--eval.limit", "0", "--log.measure_speed", "false", "--log.trackers", "[]", *words]
        environment = kept | {"PYTHONPATH": str(ROOT)} | variables
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        steps = [json.loads(line)["time/step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    [warm_start] = [event["seconds"] for event in events if event["event"] == "warm_start_done"]
    return {"warm start": warm_start, "GRPO step": median(steps)}


def wider(width: int, folder: Path) -> Path:
    """A policy of the demo's shape and this width, with random weights: large ones get more threads by default."""
    from grpo.data.word_problems import word_problems
    from policies.presets import PRESETS, build

    PRESETS["wider"] = PRESETS["tiny"] | {"hidden_size": width, "intermediate_size": 2 * width}
    PRESETS["wider"]["moe_intermediate_size"] = width // 2
    texts = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1, 2], count=400)]
    build("wider", texts, 0).save(folder)
    return folder


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of the table: medians of the repeats, alone and beside, and their ratios. All of them take turns."""
    wide = ["--model", str(wider(options.width, Path(tempfile.mkdtemp()) / "policy"))] if options.width else []
    rows: list[tuple[str, dict[str, str], list[str]]] = [("default", {}, wide)]
    for threads in options.threads:
        ways = WAYS if threads > 1 else {"libgomp's default": OF_LIBGOMP}  # one thread waits for nobody
        rows += [
            (f"{threads} threads, {way}", variables, [*wide, "--threads", str(threads)])
            for way, variables in ways.items()
        ]
    alone: list[list[dict[str, float]]] = [[] for _ in rows]
    beside: list[list[dict[str, float]]] = [[] for _ in rows]
    for _ in range(options.repeats):
        for i, (_, variables, words) in enumerate(rows):
            alone[i].append(run(variables, words, options))
            with busy():
                beside[i].append(run(variables, words, options))
    results = []
    for i, (name, *_) in enumerate(rows):
        seconds = {
            what: {"alone": median(r[what] for r in alone[i]), "beside": median(r[what] for r in beside[i])}
            for what in alone[i][0]
        }
        ratios = {what: pair["beside"] / pair["alone"] for what, pair in seconds.items()}
        results.append({"row": name, "seconds": seconds, "ratio": ratios})
        shown = "  ".join(
            f"{what} {pair['alone']:7.2f} s alone {pair['beside']:7.2f} s beside {ratios[what]:5.2f}x"
            for what, pair in seconds.items()
        )
        print(f"{name:30s} {shown}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="numbers of threads besides the default")
    parser.add_argument("--warm_start_steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5, help="GRPO steps")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a GRPO step")
    parser.add_argument("--workers", type=int, default=0, help="Ray workers")
    parser.add_argument("--width", type=int, help="a policy with random weights of this width, not the demo's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    results = measure(options)
    worst = max(results[0]["ratio"].values())
    print(
        f"with the defaults at most {worst:.2f} times slower; the bar is {BAR}: {'held' if worst <= BAR else 'MISSED'}"
    )
    if options.json:
        from grpo.run.hardware import describe

        options.json.write_text(json.dumps({"environment": describe(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
