"""Runs of `quartet train` that are struck at random, and what became of them.

Every run has its own seed, which draws its strikes: what (a worker, a reward worker, the run itself, a process of
Ray's, a simulated machine, the object store), how (SIGKILL, SIGSTOP, SIGTERM, removed, full) and in which moment
(idle, sampling, publishing, saving, measuring draft costs). A run that such a strike ends is resumed. In the end its
checkpoints must be those of a run that nothing happened to, and nothing of it may be left.

    python -m benchmarks.chaos --json benchmarks/results/chaos.json      # 100 strikes, ten runs; about 40 minutes
    python -m benchmarks.chaos --faults 6 --runs 2 --first 3
    python -m benchmarks.chaos --runs 1 --strike "reward worker, SIGSTOP, saving" --strike "run, SIGTERM, idle"
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.chaos.run import Watched
from benchmarks.chaos.strikes import (
    OWN_CLUSTER,
    SHARED_CLUSTER,
    SharedCluster,
    Strike,
    plan,
    strike,
    wait_for,
)
from grpo.run.hardware import describe

GOES_ON_S = 300.0  # until the next step, or the end: the time limits below, and that of a new worker
FULL_S = (4.0, 60.0)  # how long the object store is full: shorter than a publication may take, or longer
OPTIONS: dict[str, Any] = {
    "threads": 1,
    "data.task_options.levels": "[1]",
    "data.limit": 64,
    "prompts_per_step": 8,
    "sft.steps": 0,
    "rollout.workers": 2,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 24,
    "rollout.prompts_per_shard": 2,
    "reward.timeout_s": 5,
    "learner.learning_rate": 1e-3,
    "eval.limit": 0,
    "checkpoint.every": 3,
    "checkpoint.keep": "null",
    "log.trackers": "[]",
}
KINDS: dict[str, dict[str, Any]] = {
    "own cluster": {},  # measures its costs
    "own cluster, ahead": {"rollout.staleness": 1, "rollout.draft_tokens": 2},
    "three nodes": {"rollout.draft_tokens": 2},
}
REWARD = """
def letters(completions, **_):
    return [sum(c.isalpha() for c in completion) / 20 for completion in completions]
"""


def undisturbed(folder: Path, options: dict[str, Any]) -> dict[int, str]:
    """The checkpoints of a run that nothing happens to, as digests."""
    run = Watched(folder, options)
    run.start()
    if run.process.wait(600):
        raise RuntimeError(f"the run that nothing happens to has failed: {run.stderr.read_text()[-2000:]}")
    found = run.checkpoints()
    run.left()
    shutil.rmtree(folder.parent)
    return found


def struck(run: Watched, blows: list[Strike], shared: SharedCluster | None, seed: int) -> list[dict[str, Any]]:
    """Each blow with what came of it; `fault` where that is not as it should be."""
    results: list[dict[str, Any]] = []
    run.start()
    for blow in blows:
        worker = wait_for(run, blow.moment)
        if worker is None:
            fault = run.process.poll() not in (None, 0) and not named(run)  # a blow of before may have ended it
            results.append(vars(blow) | {"what_came": "not struck", "fault": fault, "said": run.said()})
            if not resume(run):
                break
            continue
        before, started = run.step, time.monotonic()
        seconds = FULL_S[len(results) % 2] if blow.what == "object store" else 0.0
        if blow.what == "node":
            assert shared
            victim = shared.remove()
        elif blow.what == "object store":
            assert shared
            victim = shared.fill(seconds)
        else:
            victim = strike(run, blow, worker)
        while run.process.poll() is None and run.step <= before and time.monotonic() < started + GOES_ON_S:
            time.sleep(0.05)
        entry = vars(blow) | {"victim": victim, "at_step": before, "seconds": round(time.monotonic() - started, 1)}
        if shared and shared.filler:
            shared.filler.kill()
        came = outcome(run, blow, before)
        if not victim:  # it is no fault where the run was ending by a blow of before
            came = {"what_came": "not struck", "fault": run.process.poll() is None or came["fault"]}
        results.append(entry | came)
        print(f"  seed {seed}: {results[-1]}", flush=True)
        if results[-1]["what_came"] == "hung" or not resume(run):
            break
    return results


def outcome(run: Watched, blow: Strike, before: int) -> dict[str, Any]:
    code = run.process.poll()
    if code is None:
        went_on = run.step > before
        return {"what_came": "went on" if went_on else "hung", "fault": not went_on}
    if code == 0:
        return {"what_came": "went on to its end", "fault": False}
    if blow.what == "run":
        expected = {"SIGKILL": -9, "SIGTERM": 143}[blow.how]
        fault = code != expected and not named(run)  # it may have been ending by a blow of before
        return {"what_came": f"ended by {blow.how}", "fault": fault, "code": code}
    saved = [event["saved_step"] for event in run.events("failed")] or [event["step"] for event in run.events("resume")]
    saved = saved[-1:]  # a run that is struck before its first step has what it has resumed from
    of_ray = blow.what not in ("worker", "reward worker")  # and Ray may end a process at once
    fault = not named(run, suddenly=of_ray) or (before > 0 and not saved)
    said = " ".join(run.said())[:600]
    return {"what_came": f"stopped, step {saved} saved", "said": said, "code": code, "fault": fault}


def named(run: Watched, *, suddenly: bool = False) -> bool:
    """Whether a run that has ended says why and how it goes on; `suddenly`: its last words are enough."""
    time.sleep(0.5)  # a shell says them
    said = [line for line in run.said() if suddenly or "without a word" not in line]
    return any("--resume auto" in line for line in said) and "Traceback" not in run.stderr.read_text()


def resume(run: Watched) -> bool:
    """Go on where the run has ended before its time; False where it has come to its end."""
    if run.process.poll() is None:
        return True
    if run.process.poll() == 0:
        return False
    run.start()
    return True


def one(
    folder: Path, kind: str, seed: int, blows: list[Strike], expected: dict[int, str], options: dict
) -> dict[str, Any]:
    """A run, its strikes, its end."""
    started, name = time.monotonic(), f"run_{seed}"
    shared = SharedCluster() if kind == "three nodes" else None
    run = Watched(folder / name / "run", options, shared.environment if shared else None)
    result: dict[str, Any] = {"seed": seed, "kind": kind}
    try:
        result["strikes"] = struck(run, blows, shared, seed)
        for _ in range(3):  # a last blow may have been followed by nothing yet
            if run.process.wait(300) and not resume(run):
                break
        result["ended"] = run.process.wait(300)
        found = run.checkpoints()
        result["equal"] = all(found[step] == digest for step, digest in expected.items() if step in found) and (
            max(expected) in found
        )
    except Exception as error:
        result |= {"ended": repr(error), "equal": False}
    finally:
        run.kill()
        if shared:
            shared.close()
    result["counted"] = {
        kind: run.metric(f"faults/{kind}")
        for kind in ("worker", "node", "object_store", "reward_worker", "sampling_seconds", "reward_seconds")
    }
    result["left"] = run.left()
    result["seconds"] = round(time.monotonic() - started, 1)
    good = result["equal"] and not result["left"] and not any(entry["fault"] for entry in result["strikes"])
    if good:
        shutil.rmtree(folder / name)
    print(f"seed {seed}, {kind}: {'as it should be' if good else 'FAULT'}, {json.dumps(result)}", flush=True)
    return result | {"good": good}


def table(runs: list[dict[str, Any]]) -> str:
    """How often each strike came, and what came of it."""
    rows: dict[tuple[str, str], Counter] = {}
    for run in runs:
        for entry in run["strikes"]:
            came = entry["what_came"].split(",")[0]
            rows.setdefault((f"{entry['what']} {entry['how']}", entry["moment"]), Counter())[came] += 1
    lines = [f"{'strike':32s} {'moment':12s} what came of it"]
    for (what, moment), came in sorted(rows.items()):
        lines.append(f"{what:32s} {moment:12s} {', '.join(f'{count} {word}' for word, count in came.items())}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="strikes over all runs")
    parser.add_argument("--runs", type=int, default=10, help="runs; their seeds go on from --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed; seed modulo 3 chooses the kind of run")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where the runs are; those at fault stay there")
    parser.add_argument(
        "--strike", type=Strike.read, action="append", help="WHAT, HOW, MOMENT: in place of the drawn ones"
    )
    parser.add_argument("--json", type=Path, help="add the results to those in this file")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run of the moment is ended, too
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    rewards = folder / "letters.py"
    rewards.write_text(REWARD)
    given = OPTIONS | {"steps": options.steps, "rewards": json.dumps([{"function": f"{rewards}:letters"}])}
    expected: dict[str, dict[int, str]] = {}
    runs = []
    for seed in range(options.first, options.first + options.runs):
        kind = list(KINDS)[seed % len(KINDS)]
        chosen = given | KINDS[kind]
        if kind not in expected:
            expected[kind] = undisturbed(folder / kind.replace(" ", "_").replace(",", "") / "run", chosen)
        count = options.faults // options.runs + (seed - options.first < options.faults % options.runs)
        choices = SHARED_CLUSTER if kind == "three nodes" else OWN_CLUSTER
        blows = options.strike or plan(seed, count, choices, measures=kind == "own cluster")
        runs.append(one(folder, kind, seed, blows, expected[kind], chosen))
        if options.json:
            before = json.loads(options.json.read_text())["runs"] if options.json.exists() else []
            others = [run for run in before if run["seed"] != seed]
            kept = sorted([*others, runs[-1]], key=lambda run: run["seed"])
            text = json.dumps({"environment": describe(), "options": given, "runs": kept}, indent=1)
            options.json.write_text(text.replace(str(folder), "FOLDER") + "\n")
    print(table(runs))
    good = sum(run["good"] for run in runs)
    strikes = [entry for run in runs for entry in run["strikes"] if entry["what_came"] != "not struck"]
    print(f"{len(strikes)} strikes, {good} of {len(runs)} runs as they should be")
    return int(good < len(runs))


if __name__ == "__main__":
    sys.exit(main())
