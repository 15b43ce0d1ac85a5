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
BEFORE = """# What a step teaches, measured

`make learn-all` runs everything again, in pieces of at most 40 minutes, and writes this page and its JSON,
`benchmarks/results/learn.json`. All contenders of a seed begin with the same policy and answer the same held-out
problems at T = 1, after runs of several lengths with a linear decay. Other seeds chose the learning rates; some of
their problems count too (a third of the word problems). Differences are paired by seed, ± half of their 95 % interval.
The last column is the share of GRPO's completions that a contender needs for GRPO's final accuracy.

Compare the contenders with each other only. The rise from the start is [not a gain by GRPO](findings.md), since the
supervised steps before had a constant rate.
"""


def write(runs: Mapping[str, Mapping[str, Any]], path: Path = PAGE) -> None:
    sections = [section(task, list(runs.values())) for task in TASKS]
    path.write_text("\n".join([BEFORE, *filter(None, sections)]))


def section(task: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of a task; without runs that count it is empty."""
    curves = {name: curves_of(runs, task, name) for name in NAMES}
    base = curves["grpo"]
    rows = [row(name, curves[name], base) for name in NAMES if len(base) > 1 and paired(curves[name], base)]
    return f"## {TASKS[task].title}\n\n{table(HEAD, rows)}" if rows else ""


def curves_of(runs: Sequence[Mapping[str, Any]], task: str, contender: str) -> dict[int, list[Mapping[str, Any]]]:
    """The runs that count, by seed, from the fewest steps to the most. All begin with GRPO's run of no steps."""
    curves: dict[int, list[Mapping[str, Any]]] = {}
    of_task = [run for run in runs if run["task"] == task and run["counts"]]
    for run in sorted(of_task, key=lambda run: run["steps"]):
        if run["contender"] == contender or not run["steps"]:
            curves.setdefault(run["seed"], []).append(run)
    return {seed: curve for seed, curve in curves.items() if len(curve) == 1 + len(TASKS[task].steps)}


def paired(curves: Mapping[int, Sequence[Mapping[str, Any]]], base: Mapping[int, Sequence[Mapping[str, Any]]]) -> bool:
    """Tells whether every seed has runs, all from the policy that GRPO's began with."""
    policies = [{run["policy"] for run in [*curves.get(seed, []), *of_base]} for seed, of_base in base.items()]
    return base.keys() <= curves.keys() and all(len(of_seed) == 1 for of_seed in policies)


def row(
    name: str, curves: Mapping[int, Sequence[Mapping[str, Any]]], base: Mapping[int, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """A contender beside GRPO."""
    differences: dict[str, list[float]] = {"completions": [], "seconds": []}
    shares = []
    for seed, basis in base.items():
        curve = curves[seed]
        for what, of_seeds in differences.items():
            budget = min(curve[-1][what], basis[-1][what])
            of_seeds.append(at(*column(curve, what), budget) - at(*column(basis, what), budget))
        reached = needed(*column(curve, "completions"), rising(column(basis, "completions")[1])[-1])
        shares.append(None if reached is None else reached / basis[-1]["completions"])
    cells = [plus_minus(*interval(of_seeds)) for of_seeds in differences.values()]
    rate = f"{next(iter(curves.values()))[-1]['rate']:g} ×"
    end = fmean(curve[-1]["sampled"] for curve in curves.values())
    return [f"`{name}`", rate, f"{end:.3f}", *(cells if name != "grpo" else ["", ""]), share(shares)]


def share(shares: Sequence[float | None]) -> str:
    """The mean with its interval; where some seeds never reach it, how many.

    >>> share([0.5, None])
    'not reached by 1 of 2'
    """
    known = [one for one in shares if one is not None]
    if len(known) < len(shares):
        return f"not reached by {len(shares) - len(known)} of {len(shares)}"
    return "{:.2f} ± {:.2f}".format(*interval(known))


def column(curve: Sequence[Mapping[str, float]], what: str) -> tuple[list[float], list[float]]:
    return [point[what] for point in curve], [point["sampled"] for point in curve]


def plus_minus(mean: float, half: float) -> str:
    return f"{mean:+.3f} ± {half:.3f}"
