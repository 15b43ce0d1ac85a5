"""Does sampling ahead pay? One thread for the worker and one for the learner, against one process with two threads.

Short runs of `quartet train`, in turn: the demo (examples/01_demo.yaml, after a short SFT stage of its own) and
SmolLM2 (benchmarks/ahead_smollm2.yaml, if it was prepared). Seconds are those of a step of GRPO, in the mean over
the steps after the first three, from which the pipeline is full.

    two threads      rollout.staleness: 0, one process with two threads
    one thread       rollout.staleness: 0, one process with one thread: what its rollout and its learning take alone
    two at once      the same twice, side by side: what both take while the other core is busy
    ahead 1, 2       a worker with one thread, a learner with one thread

The ceiling is t(two threads) / max(rollout with rewards, learning) of the row `one thread`: nothing is faster than its
slower half. It is printed first. The bar is 0.9 of it. The ceiling of `two at once` is what this machine leaves of it,
whose cores may share caches, memory or units of arithmetic. The machine must be quiet.

    python benchmarks/ahead.py --json benchmarks/results/ahead.json          # about five minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

from grpo.run.hardware import describe  # noqa: E402
from policies.openmp import CHOICES  # noqa: E402
from review.readers.run_folder import read_metrics  # noqa: E402

BAR = 0.9
ROOT = HERE.parent
ROWS: dict[str, tuple[int, int]] = {  # threads of the learner, rollout.staleness
    "two threads": (2, 0),
    "one thread": (1, 0),
    "two at once": (1, 0),
    "ahead 1": (1, 1),
    "ahead 2": (1, 2),
}
QUIET = ["--eval.limit", "0", "--log.trackers", "[]", "--checkpoint.every", "1000"]
FILLED = 3  # steps after which as much is in flight as ever


def quartet(*words: object, times: int = 1) -> None:
    """The same run so many times at once, in folders of their own. Raises CalledProcessError when one fails."""
    kept = {k: v for k, v in os.environ.items() if k not in (*CHOICES, "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "grpo", *map(str, words)]
    given: dict[str, Any] = {"env": kept | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.DEVNULL}
    beside = [subprocess.Popen([*command[:-1], f"{command[-1]}_{i}"], **given) for i in range(1, times)]
    subprocess.run(command, check=True, **given)
    if any(process.wait() for process in beside):
        raise subprocess.CalledProcessError(1, command)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if "time/step" in line]


def seconds_of(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps in which the pipeline was full. What the learner waited for is not learning."""
    full = steps[FILLED:]
    waited = [step.get("time/wait", 0.0) for step in full]
    return {
        "step": fmean(step["time/step"] for step in full),
        "rollout": fmean(step["time/rollout"] + step.get("time/reward", 0.0) for step in full),
        "learn": fmean(max(0.0, step["time/learn"] - wait) for step, wait in zip(full, waited, strict=True)),
        "wait": fmean(waited),
        "publish": fmean(step.get("time/sync", 0.0) for step in full),
    }


def compared(seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """The ceiling, what each ahead reached of it, and what it gained."""
    two, one = seconds["two threads"], seconds["one thread"]
    found = {"ceiling": two["step"] / max(one["rollout"], one["learn"])}
    if both := seconds.get("two at once"):
        found["ceiling with both cores busy"] = two["step"] / max(both["rollout"], both["learn"])
    for row in (row for row in seconds if row.startswith("ahead")):
        found[row] = two["step"] / seconds[row]["step"]
        found[f"{row} of the ceiling"] = found[row] / found["ceiling"]
    return found


def pays(words: list[object], steps: int, repeats: int) -> dict[str, Any]:
    """All rows take turns; of the repeats the median."""
    taken: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for row, (threads, ahead) in ROWS.items():
                out = Path(folder) / f"{row} {repeat}".replace(" ", "_")
                given = ["--threads", threads, "--rollout.staleness", ahead, "--steps", steps + FILLED]
                quartet("train", *words, *QUIET, *given, "--output_dir", out, times=1 + (row == "two at once"))
                taken[row].append(seconds_of(steps_of(out)))
                if repeat == 0 and row == "one thread":
                    print(
                        f"ceiling {compared({r: taken[r][0] for r in ('two threads', row)})['ceiling']:.3f}", flush=True
                    )
    seconds = {row: {what: median(t[what] for t in times) for what in times[0]} for row, times in taken.items()}
    found = compared(seconds)
    for row, times in seconds.items():
        shown = "  ".join(f"{what} {value:6.3f}" for what, value in times.items())
        gained = f"  {found[row]:.3f}x, {found[f'{row} of the ceiling']:.3f} of the ceiling" if row in found else ""
        print(f"{row:12s} {shown} s{gained}", flush=True)
    best = max(found[f"ahead {ahead} of the ceiling"] for ahead in (1, 2))
    held = "held" if best >= BAR else "MISSED"
    print(f"ceiling {found['ceiling']:.3f}; reached {best:.3f} of it; the bar is {BAR}: {held}")
    print(f"with both cores busy the ceiling is {found['ceiling with both cores busy']:.3f}")
    return {"seconds": seconds, "compared": found, "repeats": repeats, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft_steps", type=int, default=300, help="of the demo's policy, before what is timed")
    parser.add_argument("--demo_steps", type=int, default=12)
    parser.add_argument("--smollm2_steps", type=int, default=4)
    parser.add_argument("--smollm2", type=Path, default=ROOT / "models/smollm2-135m-mla")
    parser.add_argument("--data", default="gsm8k", help="for SmolLM2: gsm8k, or a folder with its train.jsonl")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=["demo", "smollm2"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, results = time.perf_counter(), dict[str, Any]()

    def keep(part: str, found: dict[str, Any]) -> None:
        """At once: a run that is cut off keeps what it has."""
        results[part] = found
        if options.json:
            options.json.write_text(json.dumps({"environment": describe(), "results": results}, indent=1) + "\n")

    if options.only != "smollm2":
        with tempfile.TemporaryDirectory() as folder:
            policy, given = Path(folder) / "warm", ["--sft.steps", options.sft_steps, "--threads", 2]
            demo = ROOT / "benchmarks/learn/words.yaml"
            quartet("train", demo, "--output_dir", policy, "--steps", 1, *QUIET, *given)
            print("demo", flush=True)
            words = [demo, "--model", policy / "policy", "--sft.steps", 0]
            keep("demo", pays(words, options.demo_steps, options.repeats))
    if options.only != "demo" and not options.smollm2.exists():
        print(f"SmolLM2 is left out: {options.smollm2} is not there; `make smollm2` prepares it")
    elif options.only != "demo":
        print("SmolLM2", flush=True)
        words = [ROOT / "benchmarks/ahead_smollm2.yaml", "--model", options.smollm2, "--data.name", options.data]
        words += ["--prompts_per_step", 2, "--rollout.group_size", 4, "--rollout.max_completion_tokens", 48]
        keep("smollm2", pays(words, options.smollm2_steps, options.repeats))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
