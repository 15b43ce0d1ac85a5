"""What a person sees while a run goes: one line a step, sample completions, progress bars. See also panel.py."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rewards.console import visible
from rewards.group_score import GroupScore
from rollout.group import RolloutGroup

TEXT_WIDTH = 96


# The step in words: template, scale, and the metric shown.
_WORDS: dict[str, tuple[str, float, str]] = {
    "reward": ("reward {:.3f}", 1, "reward/mean"),
    "tied": ("tied {:.0f}%", 100, "group/tied"),
    "step": ("step KL {:.2g}", 1, "policy/step_kl"),
    "norm": ("grad norm {:.2g}", 1, "learner/grad_norm"),
    "length": ("length {:.1f}", 1, "completion/length_mean"),
    "clipped": ("clipped {:.0f}%", 100, "completion/clipped"),
    "entropy": ("entropy {:.3f}", 1, "policy/entropy"),
    "forward": ("{:.2f} tokens/forward", 1, "draft/tokens_per_forward"),
    "held out": ("held out {:.2f} tokens/forward", 1, "draft/held_out_tokens_per_forward"),
    "speed": ("{:.0f} tokens/s", 1, "speed/completion_tokens_per_second"),
    "taught": ("{:.0f} tokens/s", 1, "speed/taught_tokens_per_second"),
    "time": ("{:.1f} s", 1, "time/step"),
}


def step_words(metrics: Mapping[str, float], without: Collection[str] = ()) -> list[str]:
    """Gives what a person reads of a step; what was not measured is left out, and so is what `without` names.

    >>> step_words({"reward/mean": 0.5, "group/tied": 0.25, "time/step": 1.44}, without=["reward"])
    ['tied 25%', '1.4 s']
    """
    shown = [row for key, row in _WORDS.items() if key not in without and row[2] in metrics]
    return [template.format(metrics[name] * scale) for template, scale, name in shown]


def step_line(step: int, metrics: Mapping[str, float]) -> str:
    """One step in one line.

    >>> step_line(7, {"reward/mean": 0.5, "group/tied": 0.25, "time/step": 1.44})
    'step     7  reward 0.500  tied 25%  1.4 s'
    """
    return "  ".join([f"step {step:5d}", *step_words(metrics)])


def sample_table(
    step: int,
    groups: Sequence[RolloutGroup],
    scores: Sequence[GroupScore],
    advantages: Sequence[Sequence[Any]],
    *,
    encoding: str = "utf-8",
) -> Table:
    """The best and the worst completion of the first two groups that have both (of the first two, if none has). The
    text has the width that the terminal leaves, and not more than a person reads with ease."""
    table = Table(title=f"step {step}: sample completions", title_justify="left", show_header=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=TEXT_WIDTH)
    rows = list(zip(groups, scores, advantages, strict=True))
    spread = [row for row in rows if len({reward for reward in row[1].rewards if reward is not None}) > 1]
    for group, score, row in (spread or rows)[:2]:
        table.add_row("prompt", Text(visible(group.prompt.text, 200, encoding)))  # Text: no markup is read
        rewards = [-math.inf if reward is None else reward for reward in score.rewards]
        order = sorted(range(len(rewards)), key=rewards.__getitem__)
        for index in dict.fromkeys([order[-1], order[0]]):
            completion = group.completions[index]
            marks = f"reward {_number(score.rewards[index])}\nadvantage {_number(row[index])}"
            marks += f"\n{len(completion.token_ids)} tokens, {completion.finish_reason}"
            table.add_row(marks, Text(visible(completion.text, 300, encoding)))
    return table


def _number(value: object) -> str:
    if isinstance(value, Sequence):  # an advantage of every token
        value = sum(value) / max(1, len(value))
    return "-" if value is None else f"{value:+.3f}"


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = "?" if task.total is None else f"{task.total:.0f}"
        return Text(f"{task.completed:.0f}/{total} {task.fields.get('unit', '')}")


def progress_bars(console: Console, *, enabled: bool) -> Progress:
    """Live bars such as `sampling ━━━━━ 120/256 completions 0:00:12`; without a terminal they draw nothing.

    with progress_bars(console, enabled=True) as progress:
        task = progress.add_task("sampling", total=256, unit="completions")
        progress.update(task, completed=120)
    """
    return Progress(
        *progress_columns(), console=console, transient=True, disable=not (enabled and console.is_interactive)
    )


def progress_columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}", markup=False), BarColumn(), _Count(), TimeElapsedColumn()
