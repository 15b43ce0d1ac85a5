"""The recipe's table: accuracy after each stage, on all test questions and on the easiest quarter of them.

The easiest questions are those whose gold solution has the fewest lines, two: 326 of 1,319. That is a property of the
data alone, so it was fixed before any run.

    python examples/05_gsm8k_recipe/table.py runs/gsm8k
    python examples/05_gsm8k_recipe/table.py --easiest easiest.jsonl    # writes those questions
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from grpo.data import load_examples
from grpo.eval_metrics import estimate, pass_at_k

FEWEST_LINES = 2


def main(runs: Path) -> None:
    folders = sorted(path.parent for path in runs.glob("eval_*/completions.jsonl"))
    if not folders:
        sys.exit(f"{runs} has no eval_*/completions.jsonl: run.sh writes them")
    print("| stage | questions | greedy | one sample, T = 0.7 | pass@8 |\n|---|---|---|---|---|")
    for folder in folders:
        marks = read(folder / "completions.jsonl")
        for name, chosen in (("all", marks), ("easiest", {q: m for q, m in marks.items() if m["easy"]})):
            greedy = shown([m["greedy"][0] for m in chosen.values()])
            sampled = [m["sampled"] for m in chosen.values() if m["sampled"]]
            once = shown([sum(marks) / len(marks) for marks in sampled])
            eight = shown([pass_at_k(len(marks), sum(marks), 8) for marks in sampled if len(marks) >= 8])
            print(f"| {folder.name.removeprefix('eval_')} | {len(chosen)} {name} | {greedy} | {once} | {eight} |")


def read(path: Path) -> dict[str, dict]:
    """Marks by question: `greedy` and `sampled`, lists of bool, and whether the question is `easy`."""
    marks: dict[str, dict] = defaultdict(lambda: {"greedy": [], "sampled": []})
    for line in path.read_text().splitlines():
        row = json.loads(line)
        question = marks[row["prompt_id"]]
        question["greedy" if row["way"] == "greedy" else "sampled"].append(bool(row["correct"]))
        question["easy"] = is_easy(row["solution"])
    return marks


def is_easy(solution: str) -> bool:
    return len(solution.split("####")[0].strip().splitlines()) == FEWEST_LINES


def write_easiest(path: Path) -> None:
    easy = [e.columns for e in load_examples("gsm8k", "test", purpose="eval") if is_easy(e.solution)]
    path.write_text("".join(json.dumps({"question": e["question"], "answer": e["answer"]}) + "\n" for e in easy))
    print(f"{path}: {len(easy)} questions")


def shown(values: Iterable[float]) -> str:
    if not (values := list(values)):
        return "—"
    it = estimate(values)
    return f"{100 * it.value:.2f} % ({100 * it.low:.2f} to {100 * it.high:.2f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--easiest"]:
        write_easiest(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gsm8k"))
