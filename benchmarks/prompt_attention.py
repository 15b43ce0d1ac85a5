"""Does a prompt that is read both ways (a prefix-LM) solve more word problems than a causal one, at equal steps?

For every seed two policies of examples/01_demo.yaml's size learn the gold solutions of word problems of levels 1 to 3
by the same SFT. Then held-out problems are solved, sampled and greedily. What has ended is not run again, so a
benchmark that was stopped goes on.

    python benchmarks/prompt_attention.py --json benchmarks/results/prompt_attention.json
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

WAYS = ("causal", "bidirectional")


def solved(folder: Path, way: str, seed: int, steps: int, problems: int) -> dict[str, float]:
    """The accuracies after SFT, from a run that is made where it has not ended."""
    options = sft_options(folder / f"{way}_{seed}", seed, steps, problems)
    options |= {"policy.prompt_attention": way, "rollout.draft_tokens": 0, "mtp.loss_weight": 0}
    config = load(SftConfig, None, options)
    if not (config.output_dir / "policy").is_dir():
        sft(config, resume="auto")
    last = [line for line in read_metrics(config.output_dir) if "eval/accuracy" in line][-1]
    return {name: last[f"eval/{name}"] for name in ("accuracy", "accuracy_greedy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/prompt_attention"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {
        seed: {way: solved(args.folder, way, seed, args.steps, args.problems) for way in WAYS} for seed in args.seeds
    }
    record: dict[str, Any] = {"environment": describe(), "steps": args.steps, "problems": args.problems, "seeds": found}
    for name in ("accuracy", "accuracy_greedy"):
        gains = [both["bidirectional"][name] - both["causal"][name] for both in found.values()]
        by_way = {way: fmean(both[way][name] for both in found.values()) for way in WAYS}
        half = half_interval(gains)
        record[name] = by_way | {"gain": fmean(gains), "half_of_its_interval": half}
        print(f"{name}: {by_way}, gain {fmean(gains):+.3f} +- {half:.3f}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
