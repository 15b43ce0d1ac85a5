"""Two graders on the completions that `quartet eval --output FOLDER` has kept: how often do they agree, and where not?

python benchmarks/cross_check.py runs/eval_smollm2/completions.jsonl --limit 200
python benchmarks/cross_check.py runs/eval_smollm2/completions.jsonl --ours gsm8k --other gsm8k_boxed
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from rewards import RewardSpec, Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("completions", type=Path)
    parser.add_argument("--limit", type=int, help="the first so many; all by default")
    parser.add_argument("--ours", default="gsm8k_flexible", help="a built-in reward, or FILE.py:function")
    parser.add_argument("--other", default="math_equivalence")
    args = parser.parse_args()

    with args.completions.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, args.limit)]
    names = args.ours, args.other
    with Scorer([RewardSpec(name) for name in names]) as scorer:
        scores = scorer.score(
            [row["prompt"] for row in rows],
            [[row["completion"]] for row in rows],
            [{"answer": row["solution"]} for row in rows],
            prompt_ids=[row["prompt_id"] for row in rows],
        )
    marks = {name: [score.parts[name][0] for score in scores] for name in names}
    for name, given in marks.items():
        print(f"{name:18s} {sum(mark == 1.0 for mark in given)} of {len(rows)} right")
    differing = [i for i, (a, b) in enumerate(zip(*marks.values(), strict=True)) if a != b]
    print(f"they differ on {len(differing)}")
    for i in differing:
        gold = rows[i]["solution"].rpartition("####")[2].strip()
        given = ", ".join(f"{name} {marks[name][i]}" for name in names)
        print(f"\n{rows[i]['prompt_id']}: gold {gold}; {given}\n  … {rows[i]['completion'][-240:]!r}")


if __name__ == "__main__":
    main()
