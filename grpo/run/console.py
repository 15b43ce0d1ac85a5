"""What a person sees while a run goes: one line a step, sample completions, progress bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from grpo.run.escape import escaped
from rewards.group_score import GroupScore
from rollout.group import RolloutGroup


def visible(text: str, limit: int = 400, encoding: str = "utf-8") -> str:
    r"""`text` for a terminal: control characters and what `encoding` lacks as escapes, the middle cut at `limit`.

    Model text may hold anything, terminal escape sequences and right-to-left marks included.

    >>> visible("2 + 2\n= \x1b[31m4")
    '2 + 2\\n= \\x1b[31m4'
    >>> visible("0123456789", limit=4)
    '01[... 6 characters ...]89'
    """
    if len(text) > limit:
        head, tail = math.ceil(limit / 2), limit // 2
        text = f"{text[:head]}[... {len(text) - limit} characters ...]{text[len(text) - tail :]}"
    return escaped(text, keep="").encode(encoding, "backslashreplace").decode(encoding)


class Terminal(Console):
    """The console of every command. Text on it is only text, whoever wrote it: control characters are shown as
    escapes, and [brackets] and :words: mean nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


# The step line: template, scale, and the metric shown (the first of them that is there).
_LINE: list[tuple[str, float, tuple[str, ...]]] = [
    ("reward {:.3f}", 1, ("reward/mean",)),
    ("tied {:.0f}%", 100, ("group/tied",)),
    ("length {:.1f}", 1, ("completion/length_mean",)),
    ("clipped {:.0f}%", 100, ("completion/clipped",)),
    ("loss {:+.4f}", 1, ("loss/total", "loss/policy", "loss/sft")),
    ("entropy {:.3f}", 1, ("policy/entropy",)),
    ("{:.2f} tokens/forward", 1, ("draft/tokens_per_forward",)),
    ("{:.0f} tokens/s", 1, ("speed/completion_tokens_per_second",)),
    ("{:.1f} s", 1, ("time/step",)),
]


def step_line(step: int, metrics: Mapping[str, float]) -> str:
    """One step in one line; what was not measured is left out.

    >>> step_line(7, {"reward/mean": 0.5, "group/tied": 0.25, "time/step": 1.44})
    'step     7  reward 0.500  tied 25%  1.4 s'
    """
    words = [f"step {step:5d}"]
    for template, scale, names in _LINE:
        if values := [metrics[name] for name in names if name in metrics]:
            words.append(template.format(values[0] * scale))
    return "  ".join(words)


def sample_table(
    step: int,
    groups: Sequence[RolloutGroup],
    scores: Sequence[GroupScore],
    advantages: Sequence[Sequence[Any]],
    *,
    encoding: str = "utf-8",
) -> Table:
    """The best and the worst completion of the first two groups that have both (of the first two, if none has)."""
    table = Table(title=f"step {step}: sample completions", show_lines=True, title_justify="left", expand=True)
    for column in ("prompt", "completion"):
        table.add_column(column, overflow="fold", ratio=2 if column == "prompt" else 3)
    for column in ("tokens", "reward", "advantage"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = list(zip(groups, scores, advantages, strict=True))
    spread = [row for row in rows if len({reward for reward in row[1].rewards if reward is not None}) > 1]
    for group, score, row in (spread or rows)[:2]:
        rewards = [-math.inf if reward is None else reward for reward in score.rewards]
        order = sorted(range(len(rewards)), key=rewards.__getitem__)
        for position, index in enumerate(dict.fromkeys([order[-1], order[0]])):
            completion = group.completions[index]
            table.add_row(
                Text("" if position else visible(group.prompt.text, 200, encoding)),  # Text: no markup is read
                Text(visible(completion.text, 300, encoding)),
                f"{len(completion.token_ids)} {completion.finish_reason}",
                _number(score.rewards[index]),
                _number(row[index]),
            )
    return table


def _number(value: Any) -> str:
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
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), _Count(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))
