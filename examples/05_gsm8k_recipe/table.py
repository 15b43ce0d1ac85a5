"""The recipe's table: accuracy after each stage, on all test questions and on the easiest quarter of them.

The easiest questions are those whose gold solution has the fewest lines, two: 326 of 1,319. That is a property of the
data alone, so it was fixed before any run. Where a stage called `sft` is among them, the others are compared with it
question by question: the difference of the means, ± 1.96 standard errors of the paired differences.

    python examples/05_gsm8k_recipe/table.py runs/gsm8k                 # of every runs/gsm8k/eval_*
    python examples/05_gsm8k_recipe/table.py --easiest easiest.jsonl    # writes those questions
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from review.statistics.estimates import estimate, pass_at_k
from rewards.data.examples import load_examples

FEWEST_LINES = 2
START = "sft"

Values = dict[str, float]  # by question
Marks = dict[str, dict[str, list[bool]]]  # by question and by way, "greedy" or "sampled"


def main(runs: Path) -> None:
    stages = {path.parent.name.removeprefix("eval_"): read(path) for path in runs.glob("eval_*/completions.jsonl")}
    if not stages:
        sys.exit(f"{runs} has no eval_*/completions.jsonl: run.sh writes them")
    order = sorted(stages, key=lambda stage: (stage != START, stage))
    print("| questions | stage | greedy | one sample, T = 0.7 | pass@8 |\n|---|---|---|---|---|")
    for questions in ("all", "easiest"):
        start: list[Values] | None = None
        for stage in order:
            own = measures(stages[stage], questions)
            asked = max(map(len, own))
            print(f"| {asked} {questions} | {stage} | {' | '.join(map(shown, own))} |")
            if start:
                gains = [shown_gain(a, b) for a, b in zip(own, start, strict=True)]
                print(f"| | {stage} − {START} | {' | '.join(gains)} |")
            elif stage == START:
                start = own


def read(path: Path) -> tuple[Marks, set[str]]:
    """What was right, and the ids of the easy questions."""
    marks: Marks = defaultdict(lambda: {"greedy": [], "sampled": []})
    easy = set()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        marks[row["prompt_id"]][row["way"]].append(bool(row["correct"]))
        if is_easy(row["solution"]):
            easy.add(row["prompt_id"])
    return marks, easy


def measures(stage: tuple[Marks, set[str]], questions: str) -> list[Values]:
    """Greedy accuracy, accuracy of one sample and pass@8, each by question."""
    marks, easy = stage
    chosen = {question: own for question, own in marks.items() if questions == "all" or question in easy}
    sampled = {question: own["sampled"] for question, own in chosen.items() if own["sampled"]}
    return [
        {question: float(own["greedy"][0]) for question, own in chosen.items() if own["greedy"]},
        {question: fmean(right) for question, right in sampled.items()},
        {question: pass_at_k(len(right), sum(right), 8) for question, right in sampled.items() if len(right) >= 8},
    ]


def is_easy(solution: str) -> bool:
    return len(solution.split("####")[0].strip().splitlines()) == FEWEST_LINES


def write_easiest(path: Path) -> None:
    easy = [e.columns for e in load_examples("gsm8k", "test", purpose="eval") if is_easy(e.solution)]
    path.write_text("".join(json.dumps({"question": e["question"], "answer": e["answer"]}) + "\n" for e in easy))
    print(f"{path}: {len(easy)} questions")


def shown(values: Values) -> str:
    if not values:
        return "—"
    it = estimate(list(values.values()))
    return f"{100 * it.value:.2f} % ({100 * it.low:.2f} to {100 * it.high:.2f})"


def shown_gain(values: Values, start: Values) -> str:
    differences = [values[question] - start[question] for question in values.keys() & start.keys()]
    if len(differences) < 2:
        return "—"
    return f"{100 * fmean(differences):+.2f} ± {196 * stdev(differences) / len(differences) ** 0.5:.2f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--easiest"]:
        write_easiest(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gsm8k"))
