"""The curve of examples/10_word_game.yaml over several seeds, from finished runs:

for seed in 0 1 2; do
    quartet train examples/10_word_game.yaml --seed $seed --output_dir runs/word_game_$seed
done
python benchmarks/word_game.py runs/word_game_0 runs/word_game_1 runs/word_game_2 \\
    --json benchmarks/results/word_game.json --png docs/images/word_game.png

In the size of a CI job, the seeds at once, each with one thread:

for seed in 0 1 2; do
    OMP_NUM_THREADS=1 quartet train examples/10_word_game.yaml --seed $seed --output_dir runs/word_game_$seed \\
        --warm_start.steps 120 --steps 20 --eval.every 20 --eval.limit 128 --eval.prompts_per_batch 128 &
done; wait
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COMMAND = "quartet train examples/10_word_game.yaml --seed SEED"
POSSIBLE = 0.678  # of games are won by a player who guesses any word that is still possible


def curve(run: Path) -> dict[str, Any]:
    """The share of games won at each evaluation, sampled and greedy, and the seconds without evaluations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "eval/accuracy" in row]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    warm = sum(event.get("seconds", 0.0) for event in events if event["event"] == "warm_start_done")
    about = json.loads((run / "environment.json").read_text())
    return {
        "environment": {name: value for name, value in about.items() if name != "command"},
        "steps": [row["step"] for row in found],
        "games": found[0]["eval/prompts"],
        "sampled": [row["eval/accuracy"] for row in found],
        "greedy": [row["eval/accuracy_greedy"] for row in found],
        "seconds": {
            "warm_start": warm,
            "grpo": sum(row.get("time/step", 0.0) for row in rows),
            "evaluations": sum(row.get("time/evaluate", 0.0) for row in rows),
        },
        "training": [row["reward/mean"] for row in rows if "reward/mean" in row],
    }


def draw(curves: list[dict[str, Any]], picture: Path) -> None:
    from matplotlib.figure import Figure  # pip install matplotlib

    figure = Figure(figsize=(6, 3.2), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6")
    for kind, color, label in (("sampled", "#0072B2", "sampled at T = 1"), ("greedy", "#E69F00", "greedy")):
        for i, one in enumerate(curves):
            axes.plot(one["steps"], one[kind], color=color, marker="o", markersize=3, label=None if i else label)
    axes.axhline(POSSIBLE, color="#767676", linestyle=":", label="any word that is still possible")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step of GRPO")
    axes.set_ylabel("games won")
    axes.set_title(f"{curves[0]['games']:.0f} held-out games, {len(curves)} seeds", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs that differ in their seed alone")
    parser.add_argument("--json", type=Path, help="write the curves here")
    parser.add_argument("--png", type=Path, help="draw them here")
    options = parser.parse_args()
    curves = [curve(run) for run in options.runs]
    for run, one in zip(options.runs, curves, strict=True):
        ends = [f"{kind} {one[kind][0]:.3f} to {one[kind][-1]:.3f}" for kind in ("sampled", "greedy")]
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in one["seconds"].items())
        print(f"{run}: {', '.join(ends)}; {times}")
    if options.json:
        options.json.write_text(json.dumps({"command": COMMAND, "curves": curves}, indent=1) + "\n")
    if options.png:
        draw(curves, options.png)


if __name__ == "__main__":
    main()
