"""`quartet report`: the page of a run as one HTML file to send away, with the rollouts of a few steps."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from review.page.page import check_packages, self_contained
from review.page.run_files import RunFiles, finite

GROUPS_PER_STEP = 8


@dataclass(frozen=True)
class Report:
    """A report is written at `path`. A notebook shows it in a frame."""

    path: Path

    def _repr_html_(self) -> str:
        """The frame has no access to the notebook. Without its base, a link in it would lead to the notebook."""
        page = self.path.read_text(encoding="utf-8").replace("<head>", '<head>\n<base href="about:srcdoc">', 1)
        look = 'width="100%" height="700" style="border: 0"'
        return f'<iframe sandbox="allow-scripts allow-downloads" {look} srcdoc="{html.escape(page)}"></iframe>'


def report(folder: Path, output: Path, steps: Sequence[int] | None = None) -> Path:
    """Write the report of a run. `steps`: those whose rollouts it contains, without it the first, middle and last one.
    Of each step the groups with the widest spread of rewards are chosen, at most GROUPS_PER_STEP. Raises ValueError for
    a folder that is no run and without the extra `view`, FileNotFoundError for a step that was not recorded."""
    check_packages("plotly", "tokenizers")
    run = RunFiles(folder)
    overview = run.overview()
    recorded: list[int] = overview["recorded"]
    if steps is None:
        steps = sorted({recorded[0], recorded[len(recorded) // 2], recorded[-1]}) if recorded else []
    answers: dict[str, Any] = {"runs": [run.name], "0/events": run.events()}
    for step in steps:
        answers[f"0/step/{step}"] = content = run.step(step)
        for number in _telling(content["groups"]):
            answers[f"0/group/{step}/{number}"] = run.group(step, number)
    answers["0/overview"] = overview | {"recorded": list(steps)}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")  # a report that is there stays whole until the new one is
    try:
        partial.write_text(self_contained(f"{run.name}: report", finite(answers)), encoding="utf-8")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def _telling(groups: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the numbers of the groups whose rewards differ most, ascending."""

    def spread(number: int) -> float:
        rewards = [reward for reward in groups[number]["rewards"] if reward is not None]
        return max(rewards) - min(rewards) if rewards else -1.0

    return sorted(sorted(range(len(groups)), key=lambda number: -spread(number))[:GROUPS_PER_STEP])
