"""Draws the picture of README from a finished run of the demo:

python docs/images/draw_demo.py runs/demo docs/images/demo.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure  # pip install matplotlib

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"


def running_mean(values, window=7):
    """Mean of the values around each one; shorter at the ends."""
    around = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def half_widths(share, n, z=1.96):
    """How far Wilson's 95 % interval reaches below and above a share of n."""
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    width = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return share - (middle - width) / scale, (middle + width) / scale - share


run, picture = map(Path, sys.argv[1:])
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
hardware = json.loads((run / "environment.json").read_text())

figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained", facecolor="white")
training, held_out = figure.subplots(1, 2, sharey=True, width_ratios=[1.7, 1])
for axes in (training, held_out):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6")
    axes.tick_params(colors=GREY)

steps = [row["step"] for row in rows if "reward/mean" in row]
rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
training.plot(steps, rewards, color=BLUE, linewidth=0.8, alpha=0.4)
training.plot(steps, running_mean(rewards), color=BLUE, linewidth=2.2)
training.set_title("Reward of the sampled completions", loc="left", fontsize=10)
training.set_xlabel("step of GRPO (thick: mean of 7 steps)", color=GREY)
training.set_ylabel("share of right answers", color=GREY)
training.set_ylim(0.5, 1.0)

ends = [row for row in rows if "eval/prompts" in row]
for name, label, color, shift in (
    ("eval/accuracy", "sampled at T = 1", BLUE, -0.05),
    ("eval/accuracy_greedy", "greedy", ORANGE, 0.05),
):
    values, counts = [row[name] for row in ends], [row["eval/prompts"] for row in ends]
    bars = list(zip(*map(half_widths, values, counts), strict=True))
    held_out.errorbar([i + shift for i in range(len(values))], values, bars, color=color, marker="o", capsize=3)
    held_out.plot([], [], color=color, marker="o", label=f"{label}: {values[0]:.3f} to {values[-1]:.3f}")
held_out.set_title(f"{ends[0]['eval/prompts']:.0f} held-out problems, 95 %", loc="left", fontsize=10)
held_out.set_xticks(range(len(ends)), ["before GRPO", "after GRPO"])
held_out.set_xlim(-0.4, 1.4)
held_out.legend(frameon=False, loc="lower right", fontsize=8)

machine, versions = hardware["hardware"], hardware["versions"]
figure.supxlabel(
    f"make demo · {machine['cpu']}, {machine['cores']} cores, one thread · torch {versions['torch']}",
    fontsize=7,
    color=GREY,
)
figure.savefig(picture)
