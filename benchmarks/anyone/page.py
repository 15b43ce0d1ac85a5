"""The page docs/anyone.md, from the JSON of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.table import beginning, cell, table

TOOLS = ("quartet", "rl-doctor", "rlprobe")
OUTCOMES = {"first": "named first", "later": "named later", "other": "another finding", "silent": "silent"}


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
    runs, seeds = report["runs"], report["seeds"]
    versions = ", ".join(f"{name} {number}" for name, number in report["environment"]["versions"].items())
    tools = [tool for tool in TOOLS if tool in next(iter(runs["unseen"].values()))]
    parts = [
        "# Planted faults in runs of TRL\n",
        _lead(runs, faults, honest),
        _totals(report, faults, honest, tools),
        "`python -m benchmarks.anyone` writes this page. A tiny policy that adds two numbers is trained with TRL's "
        f"`GRPOTrainer` for {report['environment']['steps']} steps on a CPU. Each run has one planted fault, or none. "
        "`review.watch` records it, and `quartet-review diagnose` reads the record. "
        "[rl-doctor](https://pypi.org/project/rldoctor/) reads `trainer_state.json` of the same run, and "
        "[rlprobe](https://pypi.org/project/rlprobe/) records the same training with its own callback.\n",
        f"Quartet's limits were chosen on the runs of seed {seeds['fitted']}. These are the columns *fitted*, and they "
        f"flatter quartet. The columns *unseen* are runs of seed {seeds['unseen']}, with other problems and other "
        "samples. No limit was changed after they were trained. The taught policies, the kinds of fault and the honest "
        "habits are the same for both seeds: expect fewer faults named, and more false alarms, in your runs. "
        "The other tools were not fitted to either seed.\n",
        "An earlier trial with training seed 7 covered 43 of the faults, after the limits were chosen. "
        "It named 41, and missed `wrong answer column` and `KL by the wrong sign`. "
        "All misses are left as they are.\n",
        f"{report['environment']['date']}; {versions}. "
        "A tool names a fault if its text describes it; `benchmarks/anyone/faults.py` lists the findings that count. "
        f"Only findings above a note are counted. The commands take {_seconds(report, tools)} of CPU time.\n",
        "## Faults\n",
        _faults(runs, faults, tools),
        "## Honest runs\n",
        _honest(runs, honest, tools),
    ]
    return "\n".join(parts)


def _lead(runs: Mapping[str, Any], faults: Mapping[str, Any], honest: Sequence[str]) -> str:
    """The unseen counts of quartet, and which faults it misses."""
    unseen = runs["unseen"]
    missed = []
    for name, fault in faults.items():
        outcome = named(fault, "quartet", unseen[name]["quartet"])
        if outcome != "first":
            missed.append(f"`{name}` ({OUTCOMES[outcome]})")
    alarms = _alarms(unseen, honest, "quartet")
    return (
        f"On runs that its limits were not chosen on, quartet names {len(faults) - len(missed)} of {len(faults)} "
        f"planted faults first, and has a finding in {alarms} of {len(honest)} honest runs. "
        f"Not named first: {', '.join(missed) or 'none'}.\n"
    )


def _seconds(report: Mapping[str, Any], tools: Sequence[str]) -> str:
    """
    >>> _seconds({"seconds_of_commands": {"quartet": 0.48, "rlprobe": 0.5}}, ["quartet", "rlprobe"])
    '0.5 s (quartet), 0.5 s (rlprobe)'
    """
    return ", ".join(f"{report['seconds_of_commands'][tool]:.1f} s ({tool})" for tool in tools)


def _alarms(runs: Mapping[str, Any], honest: Sequence[str], tool: str) -> int:
    return sum(bool(grave(runs[name][tool])) for name in honest)


def _totals(report: Mapping[str, Any], faults: Mapping[str, Any], honest: Sequence[str], tools: Sequence[str]) -> str:
    """A row for each outcome, and a column for each tool and seed."""
    rows = [[outcome] for outcome in OUTCOMES.values()]
    alarms = [f"honest runs with a finding, of {len(honest)}"]
    head = [f"of {len(faults)} faults"]
    for tool in tools:
        for which in ("unseen", "fitted"):
            runs = report["runs"][which]
            outcomes = [named(fault, tool, runs[name][tool]) for name, fault in faults.items()]
            for row, outcome in zip(rows, OUTCOMES, strict=True):
                row.append(str(outcomes.count(outcome)))
            alarms.append(str(_alarms(runs, honest, tool)))
            head.append(f"{tool}, {which}")
    return table(head, [*rows, alarms])


def _faults(runs: Mapping[str, Any], faults: Mapping[str, Any], tools: Sequence[str]) -> str:
    unseen, fitted = runs["unseen"], runs["fitted"]
    rows = []
    for name, fault in faults.items():
        row = [name, *(_first(fault, tool, unseen[name][tool]) for tool in tools)]
        row.append(_first(fault, "quartet", fitted[name]["quartet"]))
        evidence = grave(unseen[name]["quartet"])[:1]
        row.append(cell(beginning(evidence[0]["evidence"], 110)) if evidence else "–")
        rows.append(row)
    head = ["fault", *(f"{tool}, unseen" for tool in tools), "quartet, fitted", "evidence of quartet, unseen"]
    return "The first finding of each tool; bold if it names the fault.\n\n" + table(head, rows)


def _first(fault: Any, tool: str, found: Mapping[str, Any]) -> str:
    """The first finding, bold if it names the fault."""
    if not grave(found):
        return "–"
    said = f"`{grave(found)[0]['kind']}`"
    return {"first": f"**{said}**", "later": f"{said}, later named"}.get(named(fault, tool, found), said)


def _honest(runs: Mapping[str, Any], honest: Sequence[str], tools: Sequence[str]) -> str:
    columns = [("unseen", tool) for tool in tools] + [("fitted", "quartet")]
    rows = []
    for name in honest:
        row = [name]
        for which, tool in columns:
            row.append(", ".join(f"`{each['kind']}`" for each in grave(runs[which][name][tool])) or "–")
        rows.append(row)
    return table(["run", *(f"{tool}, {which}" for which, tool in columns)], rows)
