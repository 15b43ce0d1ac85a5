"""The live panel of a run on a terminal: how far it is, its curves, the last step in numbers, and what it does now."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo.run.console import progress_columns, step_words

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
CURVES = {
    "reward": ("reward/mean",),
    "loss": ("loss/sft",),  # of supervised steps, where there is no reward
    "draft loss": ("loss/mtp", "loss/mtp_tv"),
    "accuracy": ("eval/accuracy",),
    "held-out reward": ("eval/reward_mean",),
}
HELD_OUT = ("accuracy", "held-out reward")  # of which one is shown
PHASES = {"sampling": "time/rollout", "reward": "time/reward", "learning": "time/learn", "publishing": "time/sync"}
WIDTH, BESIDE = 40, 48  # columns of a curve, and of the words beside it
NAME = 20  # columns of the run's name; of a longer one the end is shown
FRAMES_PER_SECOND, STEPS_TIMED = 2, 20


def sparkline(values: Sequence[float], width: int = WIDTH, blocks: str = BLOCKS) -> str:
    """The values from left to right as bars, between the lowest and the highest of them. If there are more values than
    `width`, neighbours are averaged. Raises ValueError for no values.

    >>> sparkline([0.0, 0.5, 1.0]), sparkline([0.0, 0.5, 1.0, 1.0], width=2)
    ('▁▅█', '▁█')
    """
    count = min(width, len(values))
    cuts = [i * len(values) // count for i in range(count + 1)]
    values = [fmean(values[a:b]) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in values)


def clock(seconds: float) -> str:
    """Shows seconds as a clock does.

    >>> clock(42.4), clock(3723)
    ('0:42', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Panel:
    """Stays at the foot of the terminal while lines are printed above it, and keeps its last state there at the end.

    `rows` are the metrics of former steps where the run goes on, `last` is the number of its last step. The cursor is
    not hidden and no mode of the terminal is changed: a run that is killed leaves nothing to put right.
    """

    def __init__(self, console: Console, name: str, last: int, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.console, self.name, self.last = console, name, last
        self._curves: dict[str, list[tuple[int, float]]] = {label: [] for label in CURVES}
        self._step, self._metrics, self._note = 0, dict[str, float](), ""
        for row in rows:
            self._draw_on(row["step"], row)
        self._began = self._stepped = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=STEPS_TIMED)
        self._bars = _Bars(*progress_columns(), console=console)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=FRAMES_PER_SECOND)
        self._bars.live = self._live

    def start(self) -> None:
        self._live.start(refresh=True)

    def stop(self) -> None:
        self._note = ""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._live.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step that is done. The first one may have waited for other work, so its own time is taken."""
        now = time.monotonic()
        self._seconds.append(now - self._stepped if self._seconds else metrics.get("time/step", 0.0))
        self._stepped, self._step, self._metrics = now, step, dict(metrics)
        self._draw_on(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._draw_on(step, metrics)

    def note(self, text: str) -> None:
        """Show a line until the run ends. A handler of signals may call this: nothing is printed here."""
        self._note = text

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars of what is done now; those that are left at the end are removed."""
        before = set(self._bars.task_ids)
        try:
            yield self._bars
        finally:
            for task in set(self._bars.task_ids) - before:
                self._bars.remove_task(task)

    def _draw_on(self, step: int, metrics: Mapping[str, Any]) -> None:
        for label, names in CURVES.items():
            values = [metrics[name] for name in names if metrics.get(name) is not None]
            self._curves[label] += [(step, values[0])] if values else []

    def _render(self) -> RenderableType:
        lines: list[RenderableType] = [self._headline()]
        blocks = BLOCKS if self.console.encoding.lower().startswith("utf") else PLAIN_BLOCKS
        curves = {label: curve for label, curve in self._curves.items() if curve}
        if "accuracy" in curves:
            curves.pop("held-out reward", None)
        if "reward" in curves:
            curves = {label: curve for label, curve in curves.items() if label in ("reward", *HELD_OUT)}
        width = max(8, min(WIDTH, self.console.width - BESIDE))
        grid = Table.grid(padding=(0, 2))
        for label, curve in curves.items():
            values = [value for _, value in curve]
            span = f"{min(values):.3f} to {max(values):.3f}, step {curve[-1][0]}"
            grid.add_row(label, Text(f"{values[-1]:.3f}", "bold"), Text(sparkline(values, width, blocks), "cyan"), span)
        lines += [grid] if curves else []
        if self._metrics:
            lines += [_one_line("  ".join(step_words(self._metrics, without=("reward",)))), _one_line(self._split())]
        lines += [Text(self._note, "yellow")] if self._note else []
        if self._bars.tasks:
            lines.append(self._bars.make_tasks_table(self._bars.tasks))
        return Group(*lines)

    def _headline(self) -> RenderableType:
        words = [f"{clock(time.monotonic() - self._began)} gone"]
        if self._seconds and self._step < self.last:
            words.append(f"about {clock(fmean(self._seconds) * (self.last - self._step))} left")
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(self.last, self._step, width=12)
        name = self.name if len(self.name) <= NAME else f"...{self.name[3 - NAME :]}"
        grid.add_row(Text(name, "bold"), f"step {self._step}/{self.last}", bar, ", ".join(words))
        return grid

    def _split(self) -> str:
        """Says what the last step's time was spent on, in shares of it."""
        whole = self._metrics.get("time/step", 0.0)
        shares = {label: self._metrics.get(name, 0.0) / whole for label, name in PHASES.items()} if whole else {}
        return "  ".join(f"{label} {share:.0%}" for label, share in shares.items() if share >= 0.005)


class _Bars(Progress):
    """Bars that are drawn in the panel, which is the display of the terminal."""

    def start(self) -> None:
        raise RuntimeError("these bars are a part of the panel, which is started in their place")


def _one_line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
