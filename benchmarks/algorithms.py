"""GRPO, rank_softmax and PPO from the same warm-started policy: accuracy at equal samples and at equal seconds.

Every cell (seed, algorithm) is a run of its own under --folder. One that ended is not run again, one that was stopped
is resumed; all options of `quartet train` apply to every cell. Seconds are those of the steps: evaluation is off the
clock. The options are those that examples/01_demo.yaml tuned for GRPO, with a constant learning rate, and one update a
batch for all: what comes out compares the estimators under them, not each algorithm at its best.

    python benchmarks/algorithms.py --json algorithms.json
    python benchmarks/algorithms.py --seeds 0 --algorithm grpo --algorithm ppo --steps 20
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

from grpo.config.options import ConfigError, add_options, load, parse  # noqa: E402
from grpo.config.run import SftConfig, TrainConfig  # noqa: E402
from grpo.run.hardware import caption, describe  # noqa: E402
from grpo.run.records import read_metrics  # noqa: E402
from grpo.sft import sft  # noqa: E402
from grpo.train import train  # noqa: E402

DEMO = HERE.parent / "examples/01_demo.yaml"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "rank_softmax": {"loss.advantage": "rank_softmax", "loss.loss_type": "reinforce"},
    "ppo": {"loss.advantage": "gae"},
}
COLORS = {"grpo": "#0072B2", "rank_softmax": "#009E73", "ppo": "#E69F00"}
OPTIONS: dict[str, Any] = {
    "steps": 40,
    "rollout.refill_draws": 0,  # every algorithm samples as much a step, and learns from all of it
    "eval.every": 5,
    "eval.limit": 256,
    "learner.schedule": "constant",  # curves are compared before their end
    "log.measure_speed": False,
    "log.trackers": [],
    "log.table_every": 1000,
    "checkpoint.every": 50,
    "checkpoint.keep": 1,
}
Curve = list[dict[str, float]]  # step, samples, seconds, accuracy of one evaluation


def run_cells(
    folder: Path, config: Path, overrides: dict[str, Any], seeds: list[int], algorithms: list[str]
) -> list[dict[str, Any]]:
    """One warm start a seed, then every algorithm from it."""
    cells = []
    for seed in seeds:
        given = OPTIONS | overrides | {"seed": seed}
        start = folder / f"seed_{seed}/warm_start"
        warm = load(TrainConfig, config, given | {"output_dir": str(start), "eval.limit": 0, "eval.every": None})
        sft(SftConfig(**{name: getattr(warm, name) for name in SftConfig.model_fields}), resume="auto")
        for name in algorithms:
            cell = folder / f"seed_{seed}/{name}"
            own = {"output_dir": str(cell), "model": str(start / "policy"), "warm_start.steps": 0}
            options = load(TrainConfig, config, given | own | ALGORITHMS[name])
            print(f"seed {seed}, {name}: {cell}")
            train(options, resume="auto")
            environment = json.loads((cell / "environment.json").read_text())
            samples = options.prompts_per_step * options.rollout.group_size
            cells.append(
                {"seed": seed, "algorithm": name, "options": ALGORITHMS[name], "environment": environment}
                | {"curve": curve(read_metrics(cell), samples)}
            )
    return cells


def curve(rows: list[dict[str, Any]], samples_per_step: int) -> Curve:
    """What each evaluation found, and what it had cost until then.

    >>> curve([{"step": 0, "eval/accuracy": 0.5}, {"step": 1, "time/step": 2.0, "eval/accuracy": 0.6}], 256)[1]
    {'step': 1, 'samples': 256, 'seconds': 2.0, 'accuracy': 0.6}
    """
    points, seconds = [], 0.0
    for row in rows:
        seconds += row.get("time/step") or 0.0
        if "eval/accuracy" in row:
            step = row["step"]
            points.append(
                {"step": step, "samples": step * samples_per_step, "seconds": seconds, "accuracy": row["eval/accuracy"]}
            )
    return points


def cost_of(points: Curve, cost: str, target: float) -> float | None:
    """Samples or seconds until the accuracy first reaches `target`, between evaluations in a straight line.

    >>> cost_of([{"samples": 0, "accuracy": 0.5}, {"samples": 100, "accuracy": 0.7}], "samples", 0.65)
    75.0
    """
    before = points[0]
    for point in points:
        if point["accuracy"] >= target:
            rise = point["accuracy"] - before["accuracy"]
            part = (target - before["accuracy"]) / rise if rise > 0 else 0.0
            return round(before[cost] + part * (point[cost] - before[cost]), 6)
        before = point
    return None


def accuracy_at(points: Curve, cost: str, budget: float) -> float:
    """The accuracy that a budget of samples or seconds buys, between evaluations in a straight line.

    >>> accuracy_at([{"seconds": 0, "accuracy": 0.5}, {"seconds": 10, "accuracy": 0.7}], "seconds", 5)
    0.6
    """
    before = points[0]
    for point in points[1:]:
        if point[cost] >= budget:
            part = (budget - before[cost]) / (point[cost] - before[cost])
            return before["accuracy"] + part * (point["accuracy"] - before["accuracy"])
        before = point
    return before["accuracy"]


def summarise(cells: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Per algorithm over the seeds: cost of the target, accuracy at the budgets that every cell has spent, and
    the ratios to PPO; a seed that did not reach the target is counted, and leaves no ratio."""
    budgets = {cost: min(cell["curve"][-1][cost] for cell in cells) for cost in ("samples", "seconds")}
    algorithms = list(dict.fromkeys(cell["algorithm"] for cell in cells))
    summary: dict[str, Any] = {"target": target, "equal_samples": budgets["samples"]}
    summary |= {"equal_seconds": round(budgets["seconds"], 2), "algorithms": {}}
    for name in algorithms:
        curves = [cell["curve"] for cell in cells if cell["algorithm"] == name]
        entry: dict[str, Any] = {"seeds": len(curves)}
        for cost, budget in budgets.items():
            costs = [cost_of(points, cost, target) for points in curves]
            reached = [found for found in costs if found is not None]
            accuracies = [accuracy_at(points, cost, budget) for points in curves]
            entry |= {
                f"{cost}_to_target": costs,
                f"{cost}_to_target_mean": fmean(reached) if len(reached) == len(costs) else None,
                f"accuracy_at_equal_{cost}": fmean(accuracies),
                f"accuracy_at_equal_{cost}_std": pstdev(accuracies),
            }
        entry["seconds_per_step"] = fmean(points[-1]["seconds"] / points[-1]["step"] for points in curves)
        summary["algorithms"][name] = entry
    if "ppo" in summary["algorithms"]:
        for entry in summary["algorithms"].values():
            for cost in budgets:
                own, ppo = (e[f"{cost}_to_target_mean"] for e in (entry, summary["algorithms"]["ppo"]))
                entry[f"ppo_{cost}_over_own"] = ppo / own if own and ppo else None
    return summary


def draw(cells: list[dict[str, Any]], target: float, file: Path, foot: str) -> None:
    """Accuracy over samples and over seconds: every seed thin, the mean of the seeds thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    names = list(dict.fromkeys(cell["algorithm"] for cell in cells))
    for place, cost in enumerate(("samples", "seconds"), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.axhline(target, color="#767676", linewidth=0.8, linestyle="--")
        for name in names:
            curves = [cell["curve"] for cell in cells if cell["algorithm"] == name]
            for points in curves:
                xs = [point[cost] for point in points]
                axes.plot(xs, [point["accuracy"] for point in points], color=COLORS[name], linewidth=0.7, alpha=0.4)
            end = min(points[-1][cost] for points in curves)
            grid = [end * i / 50 for i in range(51)]
            mean = [fmean(accuracy_at(points, cost, x) for points in curves) for x in grid]
            axes.plot(grid, mean, color=COLORS[name], linewidth=2, label=f"{name} ({len(curves)} seeds)")
        axes.set_xlabel("completions sampled" if cost == "samples" else "seconds of training")
        axes.set_title(f"Held-out accuracy at T = 1, over {cost}", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    figure.supxlabel(textwrap.fill(foot, 150), fontsize=6, color="#767676")
    figure.savefig(file)


def show(summary: dict[str, Any]) -> None:
    def number(value: float | None, form: str) -> str:
        return "not reached" if value is None else format(value, form)

    target, samples, seconds = summary["target"], summary["equal_samples"], summary["equal_seconds"]
    print(f"\ntarget {target}; equal samples {samples}, equal seconds {seconds}")
    print(
        f"{'algorithm':14} {'samples to target':>18} {'seconds':>12} {'at equal samples':>18} {'at equal seconds':>18}"
    )
    for name, entry in summary["algorithms"].items():
        cells = [number(entry["samples_to_target_mean"], ".0f"), number(entry["seconds_to_target_mean"], ".1f")]
        cells += [
            f"{entry[f'accuracy_at_equal_{cost}']:.3f} ± {entry[f'accuracy_at_equal_{cost}_std']:.3f}"
            for cost in ("samples", "seconds")
        ]
        print(f"{name:14} {cells[0]:>18} {cells[1]:>12} {cells[2]:>18} {cells[3]:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here; the plot stands beside it (.png)")
    parser.add_argument("--config", type=Path, default=DEMO, help="the run that all cells share (default: the demo)")
    parser.add_argument("--folder", type=Path, default=Path("runs/algorithms"), help="where the runs lie")
    parser.add_argument("--algorithm", action="append", choices=list(ALGORITHMS), help="repeatable; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--target", type=float, default=0.7, help="held-out accuracy at T = 1 (default: 0.7)")
    add_options(parser, TrainConfig)
    try:
        arguments = parse(parser)
        if arguments.json and not arguments.json.parent.is_dir():
            parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
        if arguments.json:
            import matplotlib  # noqa: F401 (pip install matplotlib; better now than after the runs)
        algorithms = arguments.algorithm or list(ALGORITHMS)
        cells = run_cells(arguments.folder, arguments.config, arguments.overrides, arguments.seeds, algorithms)
    except ConfigError as error:
        parser.error(str(error))
    summary = summarise(cells, arguments.target)
    show(summary)
    machines = {json.dumps([cell["environment"][key] for key in ("hardware", "versions", "threads")]) for cell in cells}
    if len(machines) > 1:
        print("warning: these cells ran on different machines or versions; their seconds cannot be compared")
    if arguments.json:
        environment = describe()
        plot = arguments.json.with_suffix(".png")
        draw(cells, arguments.target, plot, caption(environment))
        options = OPTIONS | {key: str(value) for key, value in arguments.overrides.items()}
        record = {"environment": environment, "config": str(arguments.config), "options": options}
        record |= {"one_machine": len(machines) == 1, "summary": summary, "cells": cells}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
