"""Draws the picture of docs/guides/learning.md from the bench's runs:

python docs/images/draw_learning.py benchmarks/results/learn.json docs/images/learning.png grpo unsure
"""

import json
import sys
from collections import defaultdict
from statistics import fmean

from matplotlib.figure import Figure  # pip install matplotlib

COLORS = ("#767676", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")

source, picture, *names = sys.argv[1:]
with open(source, encoding="utf-8") as file:
    runs = [run for run in json.load(file)["runs"].values() if run["counts"] and run["contender"] in names]
tasks = list(dict.fromkeys(run["task"] for run in runs))
figure = Figure(figsize=(4 * len(tasks), 3.2), dpi=110, layout="constrained", facecolor="white")
for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6")
    for name, color in zip(names, COLORS, strict=False):
        points = defaultdict(list)
        for run in runs:
            if run["task"] == task and (run["contender"] == name or not run["steps"]):
                points[run["steps"]].append((run["completions"], run["sampled"]))
        means = [tuple(map(fmean, zip(*points[steps], strict=True))) for steps in sorted(points)]
        axes.plot(*zip(*means, strict=True), color=color, marker="o", lw=2.2, label=name)
        for of_steps in points.values():
            axes.plot(*zip(*of_steps, strict=True), color=color, marker=".", ls="", alpha=0.4)
    axes.set_title(task, loc="left", fontsize=10)
    axes.set_xlabel("completions sampled", color="#767676")
    axes.legend(frameon=False, loc="lower right", fontsize=8)
figure.supylabel("held-out problems right at T = 1", fontsize=9, color="#767676")
figure.savefig(picture)
