"""The page docs/anyone.md, from the JSON of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.table import beginning, cell, table

TOOLS = ("quartet", "rl-doctor", "rlprobe")


def grave(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The findings above a note."""
    return [each for each in found["said"] if each["grave"]]


def kinds_of(fault: Any, tool: str) -> set[str]:
    return fault.kinds if tool == "quartet" else fault.peers.get(tool, set())


def named(fault: Any, tool: str, found: Mapping[str, Any]) -> str:
    """Whether the first finding names the fault, a later one does, or none."""
    said = [each["kind"] for each in grave(found)]
    expected = kinds_of(fault, tool)
    if said[:1] and said[0] in expected:
        return "first"
    if expected & set(said):
        return "later"
    return "other" if said else "silent"


def page(report: Mapping[str, Any], faults: Mapping[str, Any], honest: Sequence[str]) -> str:
    runs = report["runs"]
    versions = ", ".join(f"{name} {number}" for name, number in report["environment"]["versions"].items())
    tools = [tool for tool in TOOLS if tool in next(iter(runs.values()))]
    parts = [
        "# Planted faults in runs of TRL\n",
        "`python -m benchmarks.anyone` writes this page. A tiny policy that adds two numbers is trained with TRL's "
        f"`GRPOTrainer` for {report['environment']['steps']} steps on a CPU. Each run has one planted fault, or none. "
        "`review.watch` records it, and `quartet-review diagnose` reads the record. "
        "[rl-doctor](https://pypi.org/project/rldoctor/) reads `trainer_state.json` of the same run, and "
        "[rlprobe](https://pypi.org/project/rlprobe/) records the same training with its own callback.\n",
        f"{report['environment']['date']}; {versions}. "
        "A tool names a fault if its text describes it; `benchmarks/anyone/faults.py` lists the findings that count. "
        "Only findings above a note are counted. Quartet's limits were chosen on these runs, so that its counts are a "
        "bound from above.\n",
        _totals(report, faults, honest, tools),
        "## Faults\n",
        _faults(runs, faults, tools),
        "## Honest runs\n",
        _honest(runs, honest, tools),
    ]
    return "\n".join(parts)


def _totals(report: Mapping[str, Any], faults: Mapping[str, Any], honest: Sequence[str], tools: Sequence[str]) -> str:
    runs, rows = report["runs"], []
    for tool in tools:
        outcomes = [named(fault, tool, runs[name][tool]) for name, fault in faults.items()]
        alarms = sum(bool(grave(runs[name][tool])) for name in honest)
        seconds = report["seconds_of_commands"][tool]
        counts = [str(outcomes.count(outcome)) for outcome in ("first", "later", "other", "silent")]
        rows.append([tool, *counts, f"{alarms} of {len(honest)}", f"{seconds:.1f}"])
    head = [
        "tool",
        "named first",
        "named later",
        "another finding",
        "silent",
        "honest runs with a finding",
        "CPU seconds of the command",
    ]
    return f"Of {len(faults)} faults:\n\n" + table(head, rows)


def _faults(runs: Mapping[str, Any], faults: Mapping[str, Any], tools: Sequence[str]) -> str:
    rows = []
    for name, fault in faults.items():
        row = [name]
        row += [_first(fault, tool, runs[name][tool]) for tool in tools]
        evidence = grave(runs[name]["quartet"])[:1]
        row.append(cell(beginning(evidence[0]["evidence"], 110)) if evidence else "–")
        rows.append(row)
    return "The first finding of each tool; bold if it names the fault.\n\n" + table(
        ["fault", *tools, "evidence of quartet"], rows
    )


def _first(fault: Any, tool: str, found: Mapping[str, Any]) -> str:
    """The first finding, bold if it names the fault."""
    if not grave(found):
        return "–"
    said = f"`{grave(found)[0]['kind']}`"
    return {"first": f"**{said}**", "later": f"{said}, later named"}.get(named(fault, tool, found), said)


def _honest(runs: Mapping[str, Any], honest: Sequence[str], tools: Sequence[str]) -> str:
    rows = []
    for name in honest:
        row = [name]
        for tool in tools:
            row.append(", ".join(f"`{each['kind']}`" for each in grave(runs[name][tool])) or "–")
        rows.append(row)
    return table(["run", *tools], rows)
