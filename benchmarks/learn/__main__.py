"""How much is learned from how much: contenders on tasks, from one SFT stage a seed, with intervals over seeds.

    make learn                                       # word problems, five seeds: at most 40 minutes
    make learn-all                                   # spelling too, in pieces of at most 40 minutes
    python -m benchmarks.learn --tasks words --contenders grpo unsure --seeds 0 1 2 3 4
    python -m benchmarks.learn --table               # docs/learning.md anew, from the JSON alone

Two runs go at a time, one thread each: those of a seed side by side, so that both have the same machine. A run that the
JSON has is not made again, so a piece goes on where it was stopped. An SFT stage has other bits on another kind of
machine: what a seed lacks is then made with all that it has, since only runs from one policy are compared. Before the
seeds that count, every contender gets the same search of its learning rate: RATES on the seeds and the problems of the
search, of which the highest mean after the longest runs is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.learn import page
from benchmarks.learn.contenders import NAMES
from benchmarks.learn.tasks import ROOT, TASKS, start
from benchmarks.peers.process import Started, clean
from grpo.run.hardware import describe
from policies.files.checksums import CHECKSUMS
from review.readers.machine import caption

RESULTS = ROOT / "benchmarks/results/learn.json"
POLICIES = ROOT / "runs/learn/policies"
SEARCH, SEEDS = (10, 11), (0, 1, 2, 3, 4)
RATES = (0.5, 1.0, 2.0)  # times the rate of the task's configuration
AT_ONCE = 2
LIMIT_S = 3600.0  # of one run


@dataclass(frozen=True)
class Run:
    task: str
    contender: str
    seed: int
    rate: float  # times that of the task's configuration
    steps: int
    counts: bool = True  # False: of the search

    @property
    def key(self) -> str:
        return f"{self.task}/{self.contender}/{self.rate:g}/{self.seed}/{self.steps}"


class Store:
    """The JSON of all runs. It is written after each, so that nothing is lost."""

    def __init__(self, path: Path = RESULTS) -> None:
        self.path = path
        self.runs: dict[str, dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else {}

    def lacks(self, runs: Sequence[Run]) -> list[Run]:
        """Those of the runs that are to be made: what is not there, and what began with another policy than that."""
        seeds = {run.seed for run in runs if run.key not in self.runs}
        begun = {run.key: digest(policy_of(run)) for run in runs if run.seed in seeds}
        return [run for run in runs if run.seed in seeds and self.runs.get(run.key, {}).get("policy") != begun[run.key]]

    def forget(self, task: str, rates: dict[str, float]) -> None:
        """Leaves out what counted before a new search has found other rates."""
        for key, run in list(self.runs.items()):
            at_a_rate = run["counts"] and run["steps"] > 0
            if run["task"] == task and at_a_rate and run["rate"] != rates.get(run["contender"], run["rate"]):
                del self.runs[key]

    def add(self, run: Run, results: dict[str, float]) -> None:
        begun = {"policy": digest(policy_of(run)), "machine": caption(describe())}
        self.runs[run.key] = asdict(run) | begun | results
        everything = {"command": "make learn-all", "runs": dict(sorted(self.runs.items()))}
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(everything, separators=(",", ":")) + "\n")
        partial.replace(self.path)  # who is stopped while this is written has the former one


def policy_of(run: Run) -> Path:
    """The policy that a run begins with, which is made where it is not there."""
    task = TASKS[run.task]
    return start(task, run.seed, POLICIES / f"{task.name}-{run.seed}")


def digest(policy: Path) -> str:
    """Says which weights a saved policy has."""
    files = json.loads((policy / CHECKSUMS).read_text())["files"]
    return " ".join(of["sha256"][:12] for name, of in sorted(files.items()) if name.endswith(".safetensors"))


def best_rate(store: Store, task: str, contender: str) -> float:
    """The rate whose mean over the seeds of the search is highest; the first of equals."""
    runs = searches(task, contender)
    marks = {rate: fmean(store.runs[run.key]["sampled"] for run in runs if run.rate == rate) for rate in RATES}
    return max(RATES, key=marks.__getitem__)


def searches(task: str, contender: str) -> list[Run]:
    steps = max(TASKS[task].steps)
    return [Run(task, contender, seed, rate, steps, counts=False) for seed in SEARCH for rate in RATES]


def counted(store: Store, task: str, contenders: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs that count, those of a seed together. Its first one is of no steps, for all contenders."""
    rates = {one: best_rate(store, task, one) for one in contenders}
    store.forget(task, rates)
    runs = []
    for seed in seeds:
        runs.append(Run(task, "grpo", seed, 1.0, 0))
        runs += [Run(task, one, seed, rates[one], steps) for steps in TASKS[task].steps for one in contenders]
    return runs


class Deadline:
    """Says when no other run can be expected to end in time: the longest so far is what one takes."""

    def __init__(self, minutes: float) -> None:
        self.end, self.longest = time.perf_counter() + minutes * 60, 0.0

    @property
    def passed(self) -> bool:
        return time.perf_counter() + self.longest > self.end


def make(store: Store, runs: Sequence[Run], deadline: Deadline) -> bool:
    """Makes the runs that are not there yet, AT_ONCE at a time. Returns False where the time does not suffice."""
    left = store.lacks(runs)
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, len(left), AT_ONCE):
            if deadline.passed:
                return False
            began = time.perf_counter()
            together = [(run, begin(run, Path(folder))) for run in left[first : first + AT_ONCE]]
            for run, started in together:
                finish(store, run, started, Path(folder))
            deadline.longest = max(deadline.longest, time.perf_counter() - began)
    return True


def begin(run: Run, folder: Path) -> Started:
    name = run.key.replace("/", "-")
    settings = asdict(run) | {"policy": str(policy_of(run))}
    (folder / f"{name}.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "benchmarks.learn.run", folder / f"{name}.json", folder / f"{name}.out"]
    return Started(command, threads=1)


def finish(store: Store, run: Run, started: Started, folder: Path) -> None:
    """Waits for a run, and keeps what came of it. Raises SystemExit with its last words where it failed."""
    started.wait(LIMIT_S)
    ended = started.end()
    out = folder / f"{run.key.replace('/', '-')}.out"
    if ended.code != 0:
        raise SystemExit(f"{run.key} ended with {ended.code} after {ended.seconds:.0f} s:\n{clean(ended.said)[-3000:]}")
    store.add(run, json.loads(out.read_text()))
    print(f"{run.key}: {store.runs[run.key]['sampled']:.3f} after {ended.seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learn", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["words"])
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, default=40, help="no run begins that would end after so many")
    parser.add_argument("--table", action="store_true", help="write the page from the JSON alone")
    asked = parser.parse_args()
    store, deadline = Store(), Deadline(asked.minutes)
    whole = asked.table or all(
        all(make(store, searches(task, one), deadline) for one in asked.contenders)
        and make(store, counted(store, task, asked.contenders, asked.seeds), deadline)
        for task in asked.tasks
    )
    page.write(store.runs)
    if not whole:
        print(f"{asked.minutes:g} minutes are over; the same command goes on")


if __name__ == "__main__":
    main()
