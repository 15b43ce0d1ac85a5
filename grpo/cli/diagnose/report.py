"""What `quartet diagnose` prints: the state of a run, and what to change first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from grpo.cli.diagnose.detectors import DETECTORS, EXPLAINED, Cause
from grpo.cli.diagnose.record import Record
from rewards.console import visible


def diagnose(record: Record) -> dict[str, Cause]:
    """The causes that were found by kind, in the order in which to look at them."""
    causes: dict[str, Cause] = {}
    for detector in DETECTORS:
        kind = detector.__name__
        explained = any(kind in EXPLAINED.get(earlier, ()) for earlier in causes)
        cause = None if explained else detector(record)
        if cause:
            causes[kind] = cause
    return causes


def tell(folder: Path, console: Console) -> dict[str, Any]:
    """Prints them, and returns what was found. Raises ValueError for a folder that is no run of `quartet train`."""
    record = Record(folder)
    causes, (before, after, _) = diagnose(record), record.rise
    lines = [f"{folder}: {record.state}; marks {before:.3g}, at the end {after:.3g}; {len(record.groups)} groups read"]
    for number, (kind, cause) in enumerate(causes.items(), start=1):
        lines += [f"{number}. {kind}: {cause.what}", f"   Change: {cause.change}."]
    if record.unread:
        lines.append(f"The rollouts of {len(record.unread)} steps cannot be read: {record.unread[0]}")
    if not record.groups:
        lines.append("There are no rollouts that can be read, so nothing is said of texts and groups.")
    if not record.steps:
        lines.append("No step is recorded yet.")
    elif not causes:
        lines.append("Nothing was found.")
    for line in lines:
        console.print(visible(line, 1000, console.encoding), highlight=False, soft_wrap=True)
    findings = [{"kind": kind, **cause._asdict()} for kind, cause in causes.items()]
    return {"run": str(folder), "state": record.state, "steps": record.steps, "findings": findings}
