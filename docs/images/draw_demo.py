"""Draws the picture of README from what `make figures` has measured, the demo with five seeds and its controls:

python docs/images/draw_demo.py benchmarks/results/demo.json docs/images/demo.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure  # pip install matplotlib

COLORS = {"grpo": "#0072B2", "rejection": "#009E73", "supervised": "#D55E00"}
NAMES = {
    "grpo": "GRPO",
    "rejection": "rejection sampling, about the same seconds",
    "supervised": "supervised steps, about the same seconds (best of three schedules)",
}
GREY = "#767676"


def curves_of(result):
    """Seconds after the SFT stage and held-out accuracy, by kind of training."""
    curves = {"grpo": result["grpo_curve"]}
    curves |= {kind: chosen["curve"] for kind, chosen in result["chosen"].items()}
    # A control that began at the very beginning has the seconds of the SFT stage in its own.
    early = result["chosen"]["supervised"]["name"] == "supervised_whole"
    shift = {"supervised": result["seconds"]["start"] if early else 0.0}
    points = {}
    for kind, curve in curves.items():
        moved = [(point["seconds"] - shift.get(kind, 0.0), point["sampled"]) for point in curve]
        points[kind] = [(seconds, accuracy) for seconds, accuracy in moved if seconds >= 0]
    return points


measured, picture = map(Path, sys.argv[1:])
results = list(json.loads(measured.read_text())["seeds"].values())

figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained", facecolor="white")
axes = figure.subplots()
axes.spines[["top", "right"]].set_visible(False)
axes.grid(axis="y", color="#E6E6E6")
axes.tick_params(colors=GREY)
for number, result in enumerate(results):
    for kind, points in curves_of(result).items():
        label = NAMES[kind] if number == 0 else None
        axes.plot(*zip(*points, strict=True), color=COLORS[kind], marker="o", markersize=3, linewidth=1.4, label=label)
axes.set_ylim(0, 1)
axes.set_xlim(left=0)
axes.set_xlabel("seconds of training after 100 worked answers (one core)", color=GREY)
axes.set_ylabel("held-out accuracy", color=GREY)
title = f"Sorting letters: {results[0]['problems']} problems never trained on, {len(results)} seeds"
axes.set_title(title, loc="left", fontsize=10)
axes.legend(frameon=False, loc="lower right", fontsize=9)
machine, versions = results[0]["environment"]["hardware"], results[0]["environment"]["versions"]
figure.supxlabel(f"{machine['cpu']}, one thread · torch {versions['torch']}", fontsize=7, color=GREY)
figure.savefig(picture)
