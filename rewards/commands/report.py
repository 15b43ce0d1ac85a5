"""What `quartet reward test` and `quartet reward replay` print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from rewards.commands.check import RewardCheck, Surprise
from rewards.commands.probes import KINDS
from rewards.commands.replay import Replay
from rewards.console import visible

SURPRISES_PER_KIND, CHANGES, FAILURES = 2, 8, 3


def show_check(check: RewardCheck, console: Console) -> None:
    say = partial(_say, console)
    source = f", SHA-256 {check.sha256[:12]}" if check.sha256 else ""
    say(f"reward {check.function}{source}, on {check.rows} rows of {check.data}; full marks: {check.max_score:g}")
    console.print(_kinds(check))
    same = ", ".join(f"{name}: {f'{count} differ' if count else 'the same'}" for name, count in check.differing.items())
    say(f"determinism   {same}")
    times = ", ".join(f"{name} {value:.2f}" for name, value in check.latency_ms.items())
    say(f"latency       one completion, ms: {times}; in batches {check.completions_per_second:,.0f} a second")
    correlations = ", ".join(
        f"{name}: {'the score is constant' if r is None else f'r = {r:+.2f}'}"
        for name, r in check.length_correlation.items()
    )
    say(f"with length   {correlations}")
    if check.logged:
        sums = ", ".join(f"{name} {total:,.10g}" for name, total in check.logged.items())
        say(f"logged        in all: {sums}")
    say(f"evaluation    {check.no_accuracy or 'its marks say right or wrong: accuracy is reported'}")
    if check.surprises:
        console.print(_surprises(check.surprises, console.encoding))
    for line in (*(f"note: {note}" for note in check.notes), *(f"problem: {problem}" for problem in check.problems)):
        say(line)
    say("FAILED" if check.problems else "passed")


def _kinds(check: RewardCheck) -> Table:
    columns = [Column(name, justify="right", no_wrap=True) for name in ("mean", "range", "full", "due")]
    table = Table(Column("completion", no_wrap=True), *columns, title="what completions score", title_justify="left")
    for row in check.kinds:
        if row.count:
            expected = KINDS[row.kind].expected
            due = {"full": "full", "less": "less", "same": "as gold", "odd": "less"}[expected]
            due = "any" if check.shaping else due
            table.add_row(
                KINDS[row.kind].meaning,
                _number(row.mean),
                _number(row.low) if row.low == row.high else f"{_number(row.low)}..{_number(row.high)}",
                f"{row.full}/{row.count}",
                f"{due}, {row.unexpected} not" if row.unexpected else due,
                style=("red" if expected in ("full", "less") else "yellow") if row.unexpected else None,
            )
    return table


def _surprises(surprises: Sequence[Surprise], encoding: str) -> Table:
    texts = [Column("completion", overflow="fold", ratio=1), Column("its text, and the row", overflow="fold", ratio=3)]
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("score", "due")]
    table = Table(*texts, *numbers, title="surprising cases", title_justify="left")
    counts: Counter[str] = Counter()
    for surprise in sorted(surprises, key=lambda surprise: not surprise.fault):
        counts[surprise.kind] += 1
        if counts[surprise.kind] <= SURPRISES_PER_KIND:
            text = f"{visible(surprise.completion, 120, encoding)}\n({surprise.prompt_id})".strip()
            table.add_row(KINDS[surprise.kind].meaning, Text(text), _number(surprise.score), surprise.expected)
    if more := sum(max(0, count - SURPRISES_PER_KIND) for count in counts.values()):
        table.caption = f"and {more} more; --json writes them all"
    return table


def show_replay(replay: Replay, console: Console) -> None:
    say, encoding = partial(_say, console), console.encoding
    say(f"{replay.run}: {replay.function} against the recorded {replay.against}")
    headings = ("step", "completions", "recorded", "now", "difference", "changed", "tied groups")
    columns = [Column(name, justify="right", no_wrap=True) for name in headings]
    table = Table(*columns, title="by step", title_justify="left")
    for row in replay.steps:
        difference = None if row.before is None or row.after is None else row.after - row.before
        tied = f"{row.tied_before} → {row.tied_after} of {row.groups}"
        table.add_row(
            str(row.step),
            str(row.completions),
            _number(row.before),
            _number(row.after),
            "-" if difference is None else f"{difference:+.3f}",
            f"{row.changed / row.completions:.0%}",
            tied.encode(encoding, "replace").decode(encoding),
        )
    console.print(table)
    if replay.changes:
        console.print(_changes(replay, encoding))
    for failure in replay.failures[:FAILURES]:
        say(f"problem: {failure}")
    if len(replay.failures) > FAILURES:
        say(f"problem: and {len(replay.failures) - FAILURES} more failures; --json writes them all")
    completions = sum(row.completions for row in replay.steps)
    say(f"{len(replay.changes)} of {completions} completions score differently")


def _changes(replay: Replay, encoding: str) -> Table:
    texts = [Column("prompt, sample", overflow="fold", ratio=2), Column("completion", overflow="fold", ratio=4)]
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("recorded", "now")]
    look: dict[str, Any] = {"title": "changed most", "title_justify": "left", "show_lines": True}
    table = Table(Column("step", justify="right"), *texts, *numbers, **look)
    different = {(change.completion, change.before, change.after): change for change in reversed(replay.changes)}
    for change in list(different.values())[: -CHANGES - 1 : -1]:
        place, text = Text(f"{change.prompt_id}, {change.sample}"), Text(visible(change.completion, 200, encoding))
        table.add_row(str(change.step), place, text, _number(change.before), _number(change.after))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _say(console: Console, text: str) -> None:
    text = visible(text.replace("\n", " "), 2000, console.encoding)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
