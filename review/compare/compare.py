"""`quartet compare`: curves with seeds, in numbers. Runs that differ in nothing but the seed are one group."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from string import ascii_uppercase
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from review.compare import control_over_seeds
from review.compare.control_over_seeds import Contrasts, contrasts
from review.readers.control_result import WAYS, read_control
from review.readers.old_metrics import new_metric
from review.readers.run_folder import check_run, read_metrics
from review.statistics.estimates import median_interval
from rewards.config.names import recorded_options
from rewards.config.yaml_file import flat
from rewards.verdicts import ACCURACY, MEAN_REWARD

OF_A_SEED = ("seed", "output_dir")  # what may differ inside a group
REWARD = "reward/mean"
STEPS_SHOWN = 12
TOO_FEW = (
    "two to four seeds: their mean and the values; they are too few for an interval, since one run that fails, or none "
    "that was drawn, decides the mean"
)
ENOUGH = (
    "five seeds and more: their median and its interval, which holds the median of all seeds in 93 % of cases or more, "
    "also if some runs fail"
)


class Run:
    """A run folder has a seed, other options by dotted key, metrics by step, and controls if they were trained."""

    def __init__(self, folder: Path) -> None:
        file = check_run(folder) / "config.yaml"
        if not file.is_file():
            raise ValueError(f"RUN={folder}: has no config.yaml, so nothing says which runs belong together")
        options = flat(recorded_options(file)[1])
        self.folder, self.seed = folder, options.get("seed")
        self.options = {key: value for key, value in options.items() if key not in OF_A_SEED}
        self.rows: dict[int, dict[str, float]] = {row["step"]: row for row in read_metrics(folder)}
        self.control = read_control(folder)

    def values(self, metric: str) -> dict[int, float]:
        return {step: row[metric] for step, row in self.rows.items() if row.get(metric) is not None}


@dataclass(frozen=True)
class Point:
    """One metric of a group has these values at one step: one of each run that has it, at least one."""

    values: list[float]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def median_interval(self) -> tuple[float, float] | None:
        """The interval of the median over seeds; see `median_interval`."""
        return median_interval(self.values)

    def __str__(self) -> str:
        """
        >>> print(Point([0.5]), Point([0.25, 0.75]), Point([0.1, 0.8, 0.7, 0.9, 0.7]), sep="; ")
        0.500; 0.500 (0.250, 0.750); 0.700 (0.100 to 0.900)
        """
        if interval := self.median_interval:
            return f"{self.median:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
        each = ", ".join(f"{value:.3f}" for value in self.values)
        return f"{self.mean:.3f} ({each})" if self.values[1:] else f"{self.mean:.3f}"


@dataclass(frozen=True)
class Comparison:
    """Runs are in `groups` by letter, with the options in which they differ, points by metric, step and letter, and
    GRPO against its controls by letter."""

    groups: dict[str, list[Run]]
    differing: dict[str, dict[str, Any]]
    points: dict[str, dict[int, dict[str, Point]]]
    controls: dict[str, Contrasts]


def compare(folders: Sequence[Path], metrics: Sequence[str] = (), steps: Sequence[int] = ()) -> Comparison:
    """Compares runs by these metrics: without them by the mean reward and the held-out accuracy, or the held-out reward
    where there is none. Without `steps` it takes at most STEPS_SHOWN of those that have the metric, evenly spaced.
    Raises ValueError for a folder that is no run, for two runs that are one, and for what no run has recorded.

    >>> compare([Path("runs/a0"), Path("runs/a1")]).points["eval/accuracy"][60]["A"].values
    [0.771, 0.754]
    """
    runs = [Run(folder) for folder in folders]
    metrics = [new_metric(name) for name in metrics]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = next((group for group in groups.values() if group[0].options == run.options), None)
        if same is None:
            rounds, place = divmod(len(groups), len(ascii_uppercase))  # A to Z, then A1, B1 and so on
            same = groups[ascii_uppercase[place] + (str(rounds) if rounds else "")] = []
        if twin := next((other for other in same if other.seed == run.seed), None):
            raise ValueError(
                f"RUN={run.folder}: {twin.folder} has the same options and seed {run.seed}, so the two are one run and "
                "say nothing about its spread; name one of them"
            )
        same.append(run)
    recorded = {name for run in runs for row in run.rows.values() for name, value in row.items() if value is not None}
    if not recorded:
        raise ValueError(f"RUN={folders[0]}: its metrics.jsonl has no step yet; compare it when one is done")
    for name in metrics:
        if name not in recorded:
            near = difflib.get_close_matches(name, recorded, n=1, cutoff=0)
            raise ValueError(f"--metrics {name}: no run has recorded it; the nearest that was recorded is {near[0]!r}")
    held_out = ACCURACY if ACCURACY in recorded else MEAN_REWARD
    chosen = list(metrics) or [name for name in (REWARD, held_out) if name in recorded]
    if not chosen:
        raise ValueError(f"the runs have recorded neither {REWARD} nor {held_out}; name others with --metrics")
    keys = sorted({key for run in runs for key in run.options})
    differing = {key: {letter: group[0].options.get(key) for letter, group in groups.items()} for key in keys}
    differing = {key: of for key, of in differing.items() if any(value != of["A"] for value in of.values())}
    points = {name: _points(name, groups, steps) for name in chosen}
    by_letter = {letter: contrasts({run.seed: run.control for run in group}) for letter, group in groups.items()}
    controls = {letter: found for letter, found in by_letter.items() if found}
    return Comparison(groups, differing, points, controls)


def _points(metric: str, groups: dict[str, list[Run]], steps: Sequence[int]) -> dict[int, dict[str, Point]]:
    values = {letter: [run.values(metric) for run in group] for letter, group in groups.items()}
    there = sorted({step for group in values.values() for run in group for step in run})
    if lost := sorted(set(steps) - {step for group in groups.values() for run in group for step in run.rows}):
        raise ValueError(f"--steps {lost[0]}: no run has recorded this step")
    if steps:
        there = [step for step in there if step in steps]
    elif len(there) > STEPS_SHOWN:  # the first, the last, and evenly spaced ones between them
        there = [there[round(i * (len(there) - 1) / (STEPS_SHOWN - 1))] for i in range(STEPS_SHOWN)]
    points: dict[int, dict[str, Point]] = {}
    for step in there:
        at = {letter: [run[step] for run in group if step in run] for letter, group in values.items()}
        points[step] = {letter: Point(numbers) for letter, numbers in at.items() if numbers}
    return points


def show(comparison: Comparison, console: Console) -> None:
    groups = comparison.groups
    console.print("runs that differ in nothing but the seed are one group")
    table = Table(*(Column(name, overflow="fold") for name in ("", "seeds", "runs")))
    for letter, group in groups.items():
        seeds = ", ".join(str(run.seed) for run in group)
        table.add_row(letter, seeds, "\n".join(str(run.folder) for run in group))
    console.print(table)
    if comparison.differing:
        console.print("what the groups differ in")
        table = Table("option", *groups)
        for key, of in comparison.differing.items():
            table.add_row(key, *(str(of[letter]) for letter in groups))
        console.print(table)
    for metric, points in comparison.points.items():
        console.print(metric, highlight=False)
        headings = ("step", *(f"{letter} (n = {len(group)})" for letter, group in groups.items()))
        table = Table(*(Column(heading, justify="right") for heading in headings))
        for step, at in points.items():
            table.add_row(str(step), *(_cell(at.get(letter), len(group)) for letter, group in groups.items()))
        console.print(table)
    tables = [control_over_seeds.table(way, comparison.controls) for way in WAYS]
    for table_of_way in filter(None, tables):
        console.print("GRPO and its controls, on the same held-out problems", highlight=False)
        console.print(table_of_way)
    counts = {len(point.values) for of in comparison.points.values() for at in of.values() for point in at.values()}
    notes = {
        "one seed: the value itself; it says nothing about how far another seed would be from it": counts & {1},
        TOO_FEW: counts & {2, 3, 4},
        ENOUGH: counts - {1, 2, 3, 4},
        control_over_seeds.NOTE: set(comparison.controls),
    }
    folders = " ".join(str(run.folder) for group in groups.values() for run in group)
    for line in (*filter(notes.get, notes), f"`quartet-review view {folders}` draws the curves over one another"):
        console.print(line, highlight=False, soft_wrap=True)


def _cell(point: Point | None, runs: int) -> str:
    if point is None:
        return "-"
    return str(point) if len(point.values) == runs else f"{point} [n = {len(point.values)}]"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Returns what the tables show, with every run's value."""

    def content(point: Point) -> dict[str, Any]:
        values = point.values
        over_seeds = {"mean": point.mean, "median": point.median, "median_interval": point.median_interval}
        return {"n": len(values), **over_seeds, "values": values}

    groups = {
        letter: {"runs": [str(run.folder) for run in group], "seeds": [run.seed for run in group]}
        for letter, group in comparison.groups.items()
    }
    metrics = {
        metric: [{"step": step, **{letter: content(point) for letter, point in at.items()}} for step, at in of.items()]
        for metric, of in comparison.points.items()
    }
    controls = {letter: control_over_seeds.as_json(found) for letter, found in comparison.controls.items()}
    return {"groups": groups, "differing": comparison.differing, "metrics": metrics, "controls": controls}
