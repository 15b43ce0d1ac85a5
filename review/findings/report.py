"""What `quartet diagnose` prints: the state of a run, and what to change first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from review.findings.detectors import DETECTORS, EXPLAINED, NO_CAUSE
from review.readers.record import Record
from rewards.console import visible


def diagnose(record: Record) -> list[dict[str, str]]:
    """Returns the findings, in the order in which to look at them."""
    findings: list[dict[str, str]] = []
    no_cause = NO_CAUSE.get(str(record.options.get("loss.advantage")), set())
    for detector in DETECTORS:
        kind, (is_there, what, change) = detector.__name__, detector(record)
        if kind in no_cause:
            continue
        explained = any(kind in EXPLAINED.get(earlier["kind"], ()) for earlier in findings)
        findings += [{"kind": kind, "what": what, "change": change}] if is_there and not explained else []
    return findings


def tell(folder: Path, console: Console) -> dict[str, Any]:
    """Prints the findings, and returns them. Raises ValueError for a folder that is no run of `quartet train`."""
    record = Record(folder)
    findings, (before, after, _) = diagnose(record), record.rise
    lines = [f"{folder}: {record.state}; marks {before:.3g}, at the end {after:.3g}; {len(record.groups)} groups read"]
    for number, finding in enumerate(findings, start=1):
        lines += [f"{number}. {finding['kind']}: {finding['what']}", f"   Change: {finding['change']}."]
    if record.faults:
        lines.append(f"{len(record.faults)} records of rollouts cannot be read; the first: {record.faults[0]}")
    if not record.groups:
        lines.append("There are no rollouts that can be read, so nothing is said of texts and groups.")
    if not record.steps:
        lines.append("No step is recorded yet.")
    elif not findings:
        lines.append("Nothing was found.")
    for line in lines:
        console.print(visible(line, 1000, console.encoding), highlight=False, soft_wrap=True)
    return {"run": str(folder), "state": record.state, "steps": record.steps, "findings": findings}
