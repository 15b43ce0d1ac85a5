"""What `accept: margin` costs and gives: accuracy, fallbacks and tokens a forward, margin by margin.

A draft is taken unverified where the head's best token leads the second by more than the margin; a fallback is a
forward with a draft that was not clear enough. The noise is the same for all margins, so a completion differs only
where a draft was taken that the trunk would not have drawn. Counts, no times: the machine may be busy.

    python benchmarks/margin.py runs/NAME --limit 1319 --json benchmarks/results/margin.json   # a run of quartet mtp
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks")]

from benchmarks.pretraining import shown  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402

KINDS = ("sampled", "greedy")


def evaluate(run: Path, margin: float | None, limit: int, drafts: int) -> dict[str, Any]:
    """What `quartet eval` finds; without a margin drafts are verified."""
    accept = ["--accept", "exact"] if margin is None else ["--accept", "margin", "--margin", str(margin)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "eval.json"
        command = [sys.executable, "-m", "grpo", "eval", str(run), "--limit", str(limit), "--samples", "1"]
        command += ["--draft_tokens", str(drafts), "--threads", "1", *accept, "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(file.read_text())["evaluations"]
    names = ("correct", "prompts", "accuracy", "interval_95", "tokens_per_forward", "acceptance", "fallback_rate")
    return {kind: {name: found[kind].get(name) for name in names} for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--margins", type=float, nargs="+", default=[8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    parser.add_argument("--limit", type=int, default=1319, help="held-out problems")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for margin in (None, *args.margins):
        name = "exact" if margin is None else f"{margin:g}"
        found[name] = evaluate(args.run, margin, args.limit, args.drafts)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    for kind in KINDS:
        lines: list[list[object]] = [[kind, "right", "accuracy", "fallbacks", "tokens a forward"]]
        for name, both in found.items():
            one = both[kind]
            fallbacks = "" if one["fallback_rate"] is None else f"{one['fallback_rate']:.1%}"
            lines.append(
                [name, one["correct"], f"{one['accuracy']:.3f}", fallbacks, f"{one['tokens_per_forward']:.2f}"]
            )
        print(shown(lines))
    if args.json:
        args.json.write_text(json.dumps({"environment": describe(), "margins": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
