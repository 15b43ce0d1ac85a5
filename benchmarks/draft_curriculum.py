"""Should the trunk learn several tokens ahead at once, or one more at a time? SFT with the MTP loss in the trunk.

For every seed three policies of examples/01_demo.yaml's size learn the gold solutions of word problems of levels 1 to 3
by the same SFT: `none`, whose head learns beside the trunk and changes nothing in it; `fixed`, with DeepSeek-V3's loss
at depth 4 in the trunk; `growing`, with depths 1 to 4. Then held-out problems are solved, and how deep drafts are
accepted is counted. What has ended is not run again.

    python benchmarks/draft_curriculum.py --json benchmarks/results/draft_curriculum.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

from seeds import half_interval, sft_options  # noqa: E402

from grpo.config.options import load  # noqa: E402
from grpo.config.run import SftConfig  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from grpo.run.records import read_metrics  # noqa: E402
from grpo.sft import sft  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "none": {"mtp.loss_weight": 1.0},
    "fixed": {"mtp.loss_weight": 0.3, "mtp.train_trunk": True},
    "growing": {"mtp.loss_weight": 0.3, "mtp.train_trunk": True, "warm_start.draft_depth": 1},
}


def measured(folder: Path, way: str, seed: int, steps: int, problems: int) -> dict[str, float]:
    """Accuracies and acceptance after SFT, from a run that is made where it has not ended."""
    options = sft_options(folder / f"{way}_{seed}", seed, steps, problems)
    options |= {"rollout.draft_tokens": 4, "mtp.depth": 4}
    config = load(SftConfig, None, options | WAYS[way])
    file = folder / f"{way}_{seed}.json"
    if not file.exists():
        accepted = sft(config, resume="auto").evaluations["after, sampled"].acceptance
        last = [line for line in read_metrics(config.output_dir) if "eval/accuracy" in line][-1]
        found = {name: last[f"eval/{name}"] for name in ("accuracy", "accuracy_greedy", "tokens_per_forward")}
        found |= {f"acceptance_depth_{depth}": share for depth, share in enumerate(accepted, start=1)}
        file.write_text(json.dumps(found) + "\n")
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/draft_curriculum"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {
        seed: {way: measured(args.folder, way, seed, args.steps, args.problems) for way in WAYS} for seed in args.seeds
    }
    record: dict[str, Any] = {"environment": describe(), "steps": args.steps, "problems": args.problems, "seeds": found}
    for name in next(iter(found.values()))["none"]:
        record[name] = {}
        for way in WAYS:
            values = [ways[way][name] for ways in found.values()]
            half = half_interval(values)
            record[name][way] = {"mean": fmean(values), "half_of_its_interval": half}
        print(
            name,
            {way: f"{value['mean']:.3f} +- {value['half_of_its_interval']:.3f}" for way, value in record[name].items()},
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
