"""Writes the evaluations of a run's checkpoints as the metrics of a run, for `quartet report` (learning_curve.sh).

The step is in the name of each, step_000020.json.

    python examples/05_gsm8k_recipe/learning_curve.py runs/gsm8k/curve
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(curve: Path) -> None:
    with (curve / "metrics.jsonl").open("w") as lines:
        for path in sorted(curve.glob("step_*.json")):
            ways = json.loads(path.read_text())["evaluations"]
            line = {
                "step": int(path.stem.removeprefix("step_")),
                "eval/accuracy": ways["sampled"]["accuracy"],
                "eval/accuracy_greedy": ways["greedy"]["accuracy"],
                "eval/pass_at_8": ways["sampled"]["pass_at"]["8"]["value"],
                "eval/prompts": ways["greedy"]["prompts"],
            }
            lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
