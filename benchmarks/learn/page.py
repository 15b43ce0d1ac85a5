"""The page docs/learning.md, from the JSON of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.learn.contenders import NAMES
from benchmarks.learn.figures import at, interval, needed, rising
from benchmarks.learn.tasks import TASKS
from benchmarks.peers.table import table

PAGE = Path(__file__).parents[2] / "docs/learning.md"
HEAD = ("contender", "rate", "at the end", "at equal completions", "at equal seconds", "completions to its end")
BEFORE = """# What a step teaches, measured here

`make learn-all` runs all contenders anew, in pieces of at most 40 minutes, and writes this page and its JSON,
`benchmarks/results/learn.json`. Every contender of a seed begins with the same policy and answers the same held-out
problems at T = 1. Its learning rate was searched on other seeds. Differences are paired by seed, ± half of their 95 %
interval. The last column is the share of GRPO's completions after which a contender has what GRPO has at its end; a
contender that never reaches it counts with all that it used.
"""


def write(runs: Mapping[str, Mapping[str, Any]], path: Path = PAGE) -> None:
    sections = [section(task, list(runs.values())) for task in TASKS]
    path.write_text("\n".join([BEFORE, *filter(None, sections)]))


def section(task: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of a task; without runs that count it is empty."""
    curves = {name: counted(runs, task, name) for name in NAMES}
    base = curves["grpo"]
    rows = [row(name, curves[name], base) for name in NAMES if len(base) > 1 and paired(curves[name], base)]
    return f"## {TASKS[task].title}\n\n{table(HEAD, rows)}" if rows else ""


def counted(runs: Sequence[Mapping[str, Any]], task: str, contender: str) -> dict[int, Mapping[str, Any]]:
    """The runs of the seeds that count, by seed."""
    of = [run for run in runs if (run["task"], run["contender"]) == (task, contender)]
    return {run["seed"]: run for run in of if run["counts"]}


def paired(runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> bool:
    """Tells whether every seed has a run from the policy that GRPO's began with."""
    return all(seed in runs and runs[seed]["policy"] == of_base["policy"] for seed, of_base in base.items())


def row(name: str, runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A contender beside GRPO."""
    ends, by = [], {"completions": [], "seconds": []}
    shares = []
    for seed, of_base in base.items():
        curve, basis = runs[seed]["curve"], of_base["curve"]
        ends.append(rising([point["sampled"] for point in curve])[-1])
        for what, differences in by.items():
            budget = min(curve[-1][what], basis[-1][what])
            differences.append(at(*column(curve, what), budget) - at(*column(basis, what), budget))
        target = rising([point["sampled"] for point in basis])[-1]
        reached = needed(*column(curve, "completions"), target)
        shares.append((curve[-1]["completions"] if reached is None else reached) / basis[-1]["completions"])
    cells = [plus_minus(*interval(differences)) for differences in by.values()]
    of_share = "1" if name == "grpo" else "{:.2f} ± {:.2f}".format(*interval(shares))
    rate = f"{next(iter(runs.values()))['rate']:g} ×"
    return [f"`{name}`", rate, f"{fmean(ends):.3f}", *(cells if name != "grpo" else ["", ""]), of_share]


def column(curve: Sequence[Mapping[str, float]], what: str) -> tuple[list[float], list[float]]:
    return [point[what] for point in curve], [point["sampled"] for point in curve]


def plus_minus(mean: float, half: float) -> str:
    return f"{mean:+.3f} ± {half:.3f}"
