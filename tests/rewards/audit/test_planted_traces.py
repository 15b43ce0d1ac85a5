"""The examination of `quartet audit`: 200 planted faults must be found and named, and honest traces draw no finding."""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
from planted_traces import EXAM, HONEST, KINDS, Trace, honest, plant

from rewards import finding as findings
from rewards.audit import audit as module
from rewards.audit.options import AuditConfig
from rewards.scorer import Scorer


class Finding(NamedTuple):
    """What an audit said: the name of the finding with its sentence, and the (file, row) pairs that it names."""

    text: str
    rows: frozenset[tuple[str, int]]


def run_audit(trace: Trace) -> list[Finding]:
    """Audit one trace as a user would, with its rewards, its evaluation and its tokenizer."""
    base = trace.path if trace.path.is_dir() else trace.path.parent
    with patch.object(module, "Scorer", partial(Scorer, isolated=False)):  # processes have tests of their own
        functions = list(trace.rewards.values())
        result = module.audit(trace.path, AuditConfig(), functions, trace.held_out, trace.tokenizer)
    return [Finding(f"{found.kind}: {found.evidence}", places(found, base)) for found in result.findings]


def places(found: findings.Finding, base: Path) -> frozenset[tuple[str, int]]:
    rows = [row for row in found.where if Path(row.file).is_relative_to(base)]
    return frozenset((str(Path(row.file).relative_to(base)), row.row - 1) for row in rows)


def names(trace: Trace, finding: Finding) -> bool:
    """Whether a finding is about the planted fault: one of its words, and rows that are mostly those of the fault."""
    assert trace.kind is not None
    if not re.search(KINDS[trace.kind].words, finding.text, re.I):
        return False
    if not trace.where:
        return True  # the fault is of the whole trace
    return len(finding.rows & trace.where) > len(finding.rows) / 2


HACKED = ("format_without_answer", "empty_rewarded", "copied_from_prompt", "repeated_text")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form", "seed"), EXAM, ids=lambda value: str(value))
def test_a_planted_fault_is_found_and_named(kind, form, seed, tmp_path):
    trace = plant(kind, form, seed, tmp_path)
    found = run_audit(trace)
    assert any(names(trace, finding) for finding in found), f"{kind} in {form} at {sorted(trace.where)}: {found}"
    if kind in HACKED:  # the recorded rewards are what their functions return
        assert not [finding for finding in found if finding.text.startswith("scored-otherwise")]


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_trace_whose_rewards_are_true_draws_no_finding(name, tmp_path):
    assert run_audit(honest(name, tmp_path)) == []


def test_the_exam_has_200_faults_of_every_kind():
    assert len(EXAM) == len(set(EXAM)) == 200
    assert {kind for kind, _, _ in EXAM} == set(KINDS)
    assert {form for _, form, _ in EXAM} == {"trl", "verl", "verifiers", "gym"}
    assert len(HONEST) >= 10
