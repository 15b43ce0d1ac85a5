"""Makes the metrics of a run, for `quartet plot`, of the evaluations of its checkpoints (learning_curve.sh).

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
