"""Writes the demo's word problems with each calculation as a call, such as <<3 + 5=8>>8: the form that a base model is
to learn before an agent can train it."""

import json
import re
from pathlib import Path

from rewards.data.word_problems import word_problems

if __name__ == "__main__":
    lines = []
    for problem in word_problems("train", [1, 2], count=4000):
        problem["answer"] = re.sub(r"(\d+ [-+*/] \d+) = (\d+)", r"<<\1=\2>>\2", problem["answer"])
        lines.append(json.dumps(problem))
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    (folder / "word_problems_with_calls.jsonl").write_text("\n".join(lines) + "\n")
