"""Small figures of a run, drawn from its metrics.jsonl. Needs matplotlib (`pip install quartet-rl[plots]`)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.algorithm.statistics import wilson_interval
from grpo.algorithm.verdicts import ACCURACY, MEAN_REWARD, held_out_metric
from grpo.run import hardware
from grpo.run.log import read_metrics
from policies.files.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[list[int], list[float]]

# Okabe and Ito's colours, which stay apart for colour-blind eyes; depths are one hue, dark to light.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"
PARTS = {
    "time/rollout": "#0072B2",
    "time/reward": "#E69F00",
    "time/learn": "#009E73",
    "time/publish": "#CC79A7",
    "other": "#C8C8C8",
}
BESIDE: dict[str, Any] = {"frameon": False, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
ONE_LINE = [  # file, metric, title, bottom of the y axis at zero
    ("reward", "reward/mean", "Reward, mean per step", False),
    ("length", "completion/length_mean", "Completion length, mean tokens", True),
    ("entropy", "policy/entropy", "Policy entropy, nats per token", True),
    ("tokens_per_forward", "draft/tokens_per_forward", "Completion tokens per forward", False),
]


def plot_run(output_dir: Path, only: Collection[str] = ()) -> list[Path]:
    """Draw what the run has measured (or `only` these) into `output_dir/plots/*.png` and return the files.

    Raises ModuleNotFoundError without matplotlib, ValueError before the second step.

    >>> plot_run(Path("runs/demo"))
    [PosixPath('runs/demo/plots/reward.png'), PosixPath('runs/demo/plots/length.png'), ...]
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'quartet-rl[plots]'") from error
    rows = read_metrics(output_dir)
    if len(rows) < 2:
        raise ValueError(f"{output_dir}/metrics.jsonl has {len(rows)} steps; a curve needs two")
    machine = output_dir / hardware.FILE
    foot = hardware.caption(hardware.read(machine)) if machine.exists() else ""
    judged = held_out_metric(rows) == ACCURACY
    drawings: list[tuple[str, Any]] = [
        (file, lambda axes, spec=spec: _draw_line(axes, rows, *spec)) for file, *spec in ONE_LINE
    ]
    drawings += [
        ("eval_accuracy", lambda axes: judged and _draw_accuracy(axes, rows)),
        ("eval_reward", lambda axes: not judged and _draw_held_out_reward(axes, rows)),
        ("acceptance", lambda axes: _draw_acceptance(axes, rows)),
        ("expert_load", lambda axes: _draw_load(axes, rows)),
        ("time", lambda axes: _draw_time(axes, rows)),
    ]
    written = []
    for file, draw in drawings:
        if only and file not in only:
            continue
        figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")  # no pyplot: no window, no global state
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("step", color=GREY)
        axes.tick_params(colors=GREY)
        path = output_dir / "plots" / f"{file}.png"
        if draw(axes):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            figure.supxlabel(foot[:130], fontsize=6, color=GREY)
            path.parent.mkdir(exist_ok=True)
            image = BytesIO()
            figure.savefig(image, format="png")
            write_file(path, image.getvalue())
            written.append(path)
        elif file == "eval_accuracy":
            path.unlink(missing_ok=True)  # drawn before a mark showed that the reward is no accuracy
    return written


def plot_quietly(output_dir: Path, only: Collection[str] = ()) -> list[Path]:
    """`plot_run` where it can be done: nothing without matplotlib, or before there is a curve."""
    measured = (output_dir / "metrics.jsonl").is_file() and len(read_metrics(output_dir)) > 1
    return plot_run(output_dir, only) if measured and importlib.util.find_spec("matplotlib") else []


def series(rows: list[dict[str, Any]], name: str) -> Series:
    """Steps and values of a metric where it was measured, and finite (to 1e300, which matplotlib can still scale).

    >>> series([{"step": 1, "loss/mtp": 2.0}, {"step": 2, "loss/mtp": None}, {"step": 3}], "loss/mtp")
    ([1], [2.0])
    """
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None and abs(row[name]) <= 1e300]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of up to `window` values around each one; shorter at the ends.

    >>> running_mean([0.0, 3.0, 6.0, 3.0], 3)
    [1.5, 3.0, 4.0, 4.5]
    """
    half = window // 2
    around = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in around]


def _draw(axes: Axes, points: Series, color: Any, label: str | None = None) -> None:
    """A thick running mean over a thin line of what was measured; its last value in the legend or at its end."""
    steps, values = points
    window = _window(values)
    mean = running_mean(values, window)
    if window > 1:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
        axes.set_xlabel(f"step (thick: mean of {window} steps)", color=GREY)
    (line,) = axes.plot(steps, mean, color=color, linewidth=2, marker="o" if len(steps) <= 20 else None, markersize=4)
    if label:
        line.set_label(f"{label}: {mean[-1]:.2f}")
    else:
        end, offset = (steps[-1], mean[-1]), (6, 0)
        axes.annotate(f"{mean[-1]:.3g}", end, offset, textcoords="offset points", color=color, va="center")


def _window(values: list[Any]) -> int:
    return 2 * (len(values) // 40) + 1


def _draw_line(axes: Axes, rows: list[dict[str, Any]], name: str, title: str, from_zero: bool) -> bool:
    points = series(rows, name)
    if len(points[0]) < 2:
        return False
    _draw(axes, points, BLUE)
    axes.set_title(title, loc="left", fontsize=11)
    if from_zero:
        axes.set_ylim(bottom=0)
    return True


def _draw_accuracy(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    """Sampled and greedy accuracy as they were measured, unsmoothed, each in its 95 % interval."""
    prompts = dict(zip(*series(rows, "eval/prompts"), strict=True))
    drawn = False
    for name, label, color in (("eval/accuracy", "sampled", BLUE), ("eval/accuracy_greedy", "greedy", ORANGE)):
        steps, values = series(rows, name)
        if len(steps) < 2:
            continue
        drawn = True
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=f"{label}: {values[-1]:.3f}")
        counts = [prompts.get(step, 0) for step in steps]
        bounds = [wilson_interval(value * n, n) for value, n in zip(values, counts, strict=True)]
        lows, highs = [low for low, _ in bounds], [high for _, high in bounds]
        axes.fill_between(steps, lows, highs, color=color, alpha=0.12, linewidth=0)
    axes.set_title("Accuracy on held-out prompts, 95 % intervals", loc="left", fontsize=11)
    if drawn:
        axes.legend(**BESIDE)
    return drawn


def _draw_held_out_reward(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    """Sampled and greedy mean reward as they were measured, unsmoothed."""
    drawn = False
    for name, label, color in ((MEAN_REWARD, "sampled", BLUE), (f"{MEAN_REWARD}_greedy", "greedy", ORANGE)):
        steps, values = series(rows, name)
        if len(steps) < 2:
            continue
        drawn = True
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=f"{label}: {values[-1]:.3g}")
    axes.set_title("Mean reward on held-out prompts", loc="left", fontsize=11)
    if drawn:
        axes.legend(**BESIDE)
    return drawn


def _draw_acceptance(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    from matplotlib import colormaps

    names = {name for row in rows for name in row if re.fullmatch(r"draft/acceptance_depth_\d+", name)}
    depths = sorted(int(name.rpartition("_")[2]) for name in names)
    if not depths:
        return False
    for index, depth in enumerate(depths):
        color = colormaps["Blues"](0.95 - 0.55 * index / max(1, len(depths) - 1))
        points = series(rows, f"draft/acceptance_depth_{depth}")
        if points[0]:
            _draw(axes, points, color, f"depth {depth}")
    axes.set_ylim(0, 1)
    axes.set_title("Drafts accepted, fraction of those made", loc="left", fontsize=11)
    axes.legend(**BESIDE)
    return True


def _draw_load(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    """The most and the least used expert of every layer, a hue each; their even share is the line at 1."""
    from matplotlib import colormaps

    names = {name for row in rows for name in row if re.fullmatch(r"moe/layer_\d+/load_max", name)}
    layers = sorted(int(re.findall(r"\d+", name)[0]) for name in names)
    if not layers:
        return False
    for bound, hues in (("max", colormaps["Reds"]), ("min", colormaps["Blues"])):
        for index, layer in enumerate(layers):
            points = series(rows, f"moe/layer_{layer}/load_{bound}")
            _draw(axes, points, hues(0.95 - 0.55 * index / max(1, len(layers) - 1)), f"{bound}, layer {layer}")
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_title("Load of the most and least used expert", loc="left", fontsize=11)
    axes.legend(**BESIDE)
    return True


def _draw_time(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    timed = [row for row in rows if any(row.get(part) is not None for part in PARTS)]
    steps = [row["step"] for row in timed]
    parts = {part: [row.get(part) or 0.0 for row in timed] for part in PARTS if part != "other"}
    totals = [row.get("time/step") or 0.0 for row in timed]
    parts["other"] = [max(0.0, total - sum(p[i] for p in parts.values())) for i, total in enumerate(totals)]
    stack = {part: running_mean(values, _window(steps)) for part, values in parts.items() if any(values)}
    if not stack:
        return False
    colors = [PARTS[part] for part in stack]
    axes.stackplot(steps, *stack.values(), colors=colors, labels=[part.removeprefix("time/") for part in stack])
    axes.set_title("Where a step's time goes, seconds", loc="left", fontsize=11)
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], **BESIDE)
    return True
