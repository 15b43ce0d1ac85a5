"""What `quartet diagnose` finds: the state of a run, and what to change first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from review.findings.alarms import SAID, SUSPECTS
from review.findings.detectors import DETECTORS, EXPLAINED, NEEDED, NO_CAUSE, OF_CURVES, OF_RECORD
from review.findings.gains import of_run
from review.readers.metric_logs import Log, lacking, read_log
from review.readers.record import Record
from rewards.audit.audit import audit
from rewards.audit.detectors import OF_SAMPLE
from rewards.audit.findings import Rollouts
from rewards.audit.options import AuditConfig
from rewards.audit.traces import Trace, trace_files, traces_of
from rewards.finding import Finding, Report, found
from rewards.kinds import KINDS, ORDER
from rewards.records import rollout_path

SUSPECTED = {SAID[feature][0] for feature in SUSPECTS}  # over all steps one of them goes with the score best
OF_FOLDER = "options, events and rollouts of a run"


def diagnose(record: Record) -> list[Finding]:
    """Returns the findings, causes before their symptoms. What an earlier finding explains is left out."""
    each = [detector(record) for detector in DETECTORS]
    of_curves = [finding for finding in each if finding is not None]
    over_all = {finding.kind for finding in of_curves} & SUSPECTED
    sounded = [finding for finding in of_events(record) if not over_all or finding.kind not in SUSPECTED]
    every = [*of_curves, *of_run(record.gains), *sounded, *of_rollouts(record)]
    every.sort(key=lambda finding: ORDER[finding.kind])
    findings: list[Finding] = []
    left_out = set(NO_CAUSE.get(str(record.options.get("loss.advantage")), ()))
    for finding in every:
        if finding.kind in left_out:
            continue
        left_out |= {finding.kind} | EXPLAINED.get(finding.kind, set())
        if finding.change == KINDS[finding.kind].change:
            finding = replace(finding, change=record.with_values(finding.change))
        findings.append(finding)
    return findings


def of_events(record: Record) -> list[Finding]:
    """The alarms that sounded while the run trained."""
    alarms = [event for event in record.events if event["event"] == "alarm"]
    old = {feature: kind for feature, (kind, _) in SAID.items()}  # runs of version 0.4 and before
    kinds = [old.get(event["kind"], event["kind"]) for event in alarms]
    return [
        found(kind, f"{event.get('said')} at step {event.get('step')}")
        for kind, event in zip(kinds, alarms, strict=True)
        if kind in KINDS
    ]


def of_rollouts(record: Record) -> list[Finding]:
    """What an audit finds in the rollouts that were read."""
    traces: list[Trace] = []
    for step, lines in record.audited.items():
        traces += traces_of(rollout_path(record.folder, step), lines)
    rollouts = Rollouts(traces)
    findings = [finding for detector in OF_SAMPLE for finding in detector(rollouts)]
    return [finding for finding in findings if finding.where]


def report(path: Path) -> Report:
    """What a run folder shows, or rollouts that another trainer recorded, which have no curves, or its curves, which
    have no rollouts. Raises ValueError for what is none of them."""
    log = log_of_others(path)
    if log and (path.is_file() or not is_of_others(path)):
        return of_log(log)
    if not is_of_others(path):
        return of_run_folder(path)
    result = audit(path, AuditConfig())
    if log is None:
        result.lacking["options, metrics and events of a run"] = list(OF_RECORD)
        return result
    curves = of_log(log)
    result.findings += curves.findings
    result.facts |= curves.facts
    result.lacking["options and events of a run"] = curves.lacking.pop(OF_FOLDER)
    result.lacking |= curves.lacking
    return result


def is_of_others(path: Path) -> bool:
    """Whether there are rollouts, and no run of ours."""
    if path.is_file():
        return True
    if next(path.glob("metrics.jsonl"), None) or next(path.glob("*/metrics.jsonl"), None):
        return False
    try:
        return bool(trace_files(path))
    except FileNotFoundError:
        return False


def log_of_others(path: Path) -> Log | None:
    """The curves of another trainer, where there is no run of ours."""
    if (path / "metrics.jsonl").is_file() or path.name == "metrics.jsonl":
        return None
    return read_log(path)


def of_log(log: Log) -> Report:
    record = Record.of_log(log)
    before, after, _ = record.rise
    facts: dict[str, object] = {
        "read": f"{len(log.rows)} steps of {log.form}",
        "score": f"{before:.3g}, at the end {after:.3g}",
    }
    report = Report(str(log.path), diagnose(record), facts, more={"run": str(log.path), "steps": record.steps})
    report.lacking = lacking(log, NEEDED)
    report.lacking[OF_FOLDER] = sorted(set(OF_RECORD) - OF_CURVES, key=ORDER.__getitem__)
    return report


def of_run_folder(folder: Path) -> Report:
    record = Record(folder)
    before, after, _ = record.rise
    facts: dict[str, object] = {
        "state": record.state,
        "score of the first reward": f"{before:.3g}, at the end {after:.3g}",
        "read": f"{len(record.groups)} groups of {len(record.lines)} steps, rollouts of {len(record.audited)}",
    }
    if record.faults:
        facts["cannot be read"] = f"{len(record.faults)} records of rollouts; the first: {record.faults[0]}"
    if not record.groups:
        facts["read"] = "There are no rollouts that can be read, so nothing is said of texts and groups."
    if not record.steps:
        facts["state"] = "No step is recorded yet."
    more = {"run": str(folder), "steps": record.steps}
    return Report(str(folder), diagnose(record), facts, more=more)
