"""Small figures of a run, drawn from its metrics.jsonl. Needs matplotlib (`pip install quartet-rl[plots]`)."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.algorithm.statistics import wilson_interval
from grpo.algorithm.verdicts import ACCURACY, MEAN_REWARD, held_out_metric
from grpo.run import hardware
from grpo.run.records import read_metrics
from policies.files.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]
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
FOOT_WIDTH = 120  # characters in a line under a figure
BESIDE: dict[str, Any] = {"frameon": False, "loc": "center left", "bbox_to_anchor": (1, 0.5)}


def plot_run(output_dir: Path, only: Collection[str] = ()) -> list[Path]:
    """Draw what the run has measured (or `only` these) into `output_dir/plots/*.png` and return the files.

    Raises ValueError without matplotlib, and before the second step.

    >>> plot_run(Path("runs/demo"))
    [PosixPath('runs/demo/plots/reward.png'), PosixPath('runs/demo/plots/length.png'), ...]
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ValueError("plots need matplotlib: pip install 'quartet-rl[plots]'") from error
    rows = read_metrics(output_dir)
    if len(rows) < 2:
        raise ValueError(f"{output_dir}/metrics.jsonl has {len(rows)} steps; a curve needs two")
    machine = output_dir / hardware.FILE
    foot = textwrap.fill(hardware.caption(hardware.read(machine)), FOOT_WIDTH) if machine.exists() else ""
    drawings: list[tuple[str, str, Callable[[Axes, Rows], bool]]] = [
        ("reward", "Reward, mean per step", partial(_draw_line, name="reward/mean")),
        ("length", "Completion length, mean tokens", partial(_draw_line, name="completion/length_mean", bottom=0)),
        ("entropy", "Policy entropy, nats per token", partial(_draw_line, name="policy/entropy", bottom=0)),
        ("tokens_per_forward", "Completion tokens per forward", partial(_draw_line, name="draft/tokens_per_forward")),
        ("eval_accuracy", "Accuracy on held-out prompts, 95 % intervals", partial(_draw_held_out, metric=ACCURACY)),
        ("eval_reward", "Mean reward on held-out prompts", partial(_draw_held_out, metric=MEAN_REWARD)),
        ("acceptance", "Drafts accepted, fraction of those made", _draw_acceptance),
        ("expert_load", "Load of the most and least used expert", _draw_load),
        ("time", "Where a step's time goes, seconds", _draw_time),
    ]
    written = []
    for file, title, draw in drawings:
        if only and file not in only:
            continue
        figure = Figure(
            figsize=(6, 3.6 + 0.1 * foot.count("\n")), dpi=150, layout="constrained"
        )  # no pyplot: no window, no global state
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step", color=GREY)
        axes.tick_params(colors=GREY)
        path = output_dir / "plots" / f"{file}.png"
        if draw(axes, rows):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            figure.supxlabel(foot, fontsize=6, color=GREY)
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


def series(rows: Rows, name: str) -> Series:
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


def _draw_line(axes: Axes, rows: Rows, name: str, bottom: float | None = None) -> bool:
    points = series(rows, name)
    if len(points[0]) < 2:
        return False
    _draw(axes, points, BLUE)
    axes.set_ylim(bottom=bottom)
    return True


def _draw_held_out(axes: Axes, rows: Rows, metric: str) -> bool:
    """Sampled and greedy values as they were measured, unsmoothed; an accuracy in its 95 % interval."""
    if held_out_metric(rows) != metric:
        return False
    prompts = dict(zip(*series(rows, "eval/prompts"), strict=True))
    drawn = False
    for name, label, color in ((metric, "sampled", BLUE), (f"{metric}_greedy", "greedy", ORANGE)):
        steps, values = series(rows, name)
        if len(steps) < 2:
            continue
        drawn = True
        last = f"{values[-1]:.3f}" if metric == ACCURACY else f"{values[-1]:.3g}"
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=f"{label}: {last}")
        if metric == ACCURACY:
            counts = [prompts.get(step, 0) for step in steps]
            bounds = [wilson_interval(value * n, n) for value, n in zip(values, counts, strict=True)]
            lows, highs = zip(*bounds, strict=True)
            axes.fill_between(steps, lows, highs, color=color, alpha=0.12, linewidth=0)
    if drawn:
        axes.legend(**BESIDE)
    return drawn


def _draw_each(axes: Axes, rows: Rows, metric: str, hues: str, label: str) -> bool:
    """A curve for every number that <d> in the name of `metric` was, dark to light."""
    from matplotlib import colormaps

    found = (re.fullmatch(metric.replace("<d>", r"(\d+)"), name) for name in {name for row in rows for name in row})
    numbers = sorted(int(match[1]) for match in found if match)
    for index, number in enumerate(numbers):
        points = series(rows, metric.replace("<d>", str(number)))
        if points[0]:
            color = colormaps[hues](0.95 - 0.55 * index / max(1, len(numbers) - 1))
            _draw(axes, points, color, label.replace("<d>", str(number)))
    return bool(numbers)


def _draw_acceptance(axes: Axes, rows: Rows) -> bool:
    if not _draw_each(axes, rows, "draft/acceptance_depth_<d>", "Blues", "depth <d>"):
        return False
    axes.set_ylim(0, 1)
    axes.legend(**BESIDE)
    return True


def _draw_load(axes: Axes, rows: Rows) -> bool:
    """The most and the least used expert of every layer, a hue each; their even share is the line at 1."""
    if not _draw_each(axes, rows, "moe/layer_<d>/load_max", "Reds", "max, layer <d>"):
        return False
    _draw_each(axes, rows, "moe/layer_<d>/load_min", "Blues", "min, layer <d>")
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.legend(**BESIDE)
    return True


def _on_the_clock(row: Mapping[str, float]) -> Mapping[str, float]:
    """Of a batch that was sampled ahead only the wait for it."""
    if "time/wait" not in row:
        return row
    learn = (row.get("time/learn") or 0.0) - row["time/wait"]
    return {**row, "time/rollout": row["time/wait"], "time/reward": 0.0, "time/learn": max(0.0, learn)}


def _draw_time(axes: Axes, rows: Rows) -> bool:
    timed = [row for row in rows if any(row.get(part) is not None for part in PARTS)]
    steps = [row["step"] for row in timed]
    seen = [_on_the_clock(row) for row in timed]
    parts = {part: [row.get(part) or 0.0 for row in seen] for part in PARTS if part != "other"}
    totals = [row.get("time/step") or 0.0 for row in timed]
    parts["other"] = [max(0.0, total - sum(p[i] for p in parts.values())) for i, total in enumerate(totals)]
    stack = {part: running_mean(values, _window(steps)) for part, values in parts.items() if any(values)}
    if not stack:
        return False
    colors = [PARTS[part] for part in stack]
    axes.stackplot(steps, *stack.values(), colors=colors, labels=[part.removeprefix("time/") for part in stack])
    axes.set_ylim(bottom=0)
    axes.legend(reverse=True, **BESIDE)
    return True
