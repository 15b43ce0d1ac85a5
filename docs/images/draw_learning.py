"""Draws the picture of docs/guides/learning.md from the bench's runs:

python docs/images/draw_learning.py benchmarks/results/learn.json docs/images/learning.png grpo unsure
"""

import json
import sys
from collections import defaultdict
from statistics import fmean

from matplotlib.figure import Figure  # pip install matplotlib
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

COLORS = ("#767676", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
GREY = "#5B6570"
NAMES = {"grpo": "GRPO", "unsure": "uncertainty-based prompt selection, two updates per batch"}
TASKS = {"words": "word problems", "spelling": "spelling words backward"}


def points_of(runs, task, name):
    """Completions and accuracy of each seed, by steps. All contenders of a seed share its start, step 0."""
    points = defaultdict(list)
    for run in runs:
        is_start = run["steps"] == 0
        if run["task"] == task and (run["contender"] == name or is_start):
            points[run["steps"]].append((run["completions"], run["sampled"]))
    return [points[steps] for steps in sorted(points)]


def mean_of(seeds):
    completions, accuracies = zip(*seeds, strict=True)
    return fmean(completions), fmean(accuracies)


source, picture, *names = sys.argv[1:]
with open(source, encoding="utf-8") as file:
    runs = [run for run in json.load(file)["runs"].values() if run["counts"] and run["contender"] in names]
tasks = sorted({run["task"] for run in runs}, key=lambda task: list(TASKS).index(task) if task in TASKS else len(TASKS))
figure = Figure(figsize=(4 * len(tasks), 3.6), dpi=110, layout="constrained", facecolor="white")
panels = figure.subplots(1, len(tasks), squeeze=False)[0]
for axes, task in zip(panels, tasks, strict=True):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6")
    axes.tick_params(colors=GREY)
    for name, color in zip(names, COLORS, strict=False):
        steps = points_of(runs, task, name)
        means = [mean_of(seeds) for seeds in steps]
        axes.plot(*zip(*means, strict=True), color=color, marker="o", linewidth=2.2, label=NAMES.get(name, name))
        for seeds in steps:
            axes.plot(*zip(*seeds, strict=True), color=color, marker=".", linestyle="", alpha=0.4)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
    axes.set_title(TASKS.get(task, task), loc="left", fontsize=10)
    axes.set_xlabel("completions sampled", color=GREY)
panels[0].set_ylabel("held-out accuracy", color=GREY)
lines, labels = panels[0].get_legend_handles_labels()
figure.legend(lines, labels, frameon=False, loc="outside upper left", ncols=len(names), fontsize=9)
figure.supxlabel("Lines: mean of the seeds. Dots: one seed each. Sampled at temperature 1.", fontsize=7, color=GREY)
figure.savefig(picture)
