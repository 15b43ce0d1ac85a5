"""The examination of `quartet audit`: 200 planted faults must be found and named, and honest traces draw no finding."""

import importlib
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from planted_traces import EXAM, HONEST, KINDS, Trace, honest, plant

AUDIT = "rewards.audit"
exists = pytest.mark.skipif(importlib.util.find_spec(AUDIT) is None, reason=f"{AUDIT} does not exist yet")


class Finding(NamedTuple):
    """What an audit said: the name of the finding with its sentence, and the (file, row) pairs that it names."""

    text: str
    rows: frozenset[tuple[str, int]]


def run_audit(trace: Trace) -> list[Finding]:
    """Audit one trace as a user would, with its rewards, its evaluation and its tokenizer; the audit joins here."""
    raise NotImplementedError("rewards.audit has not joined the examination yet")


def names(trace: Trace, finding: Finding) -> bool:
    """Whether a finding is about the planted fault: one of its words, and rows that are mostly those of the fault."""
    assert trace.kind is not None
    if not re.search(KINDS[trace.kind].words, finding.text, re.I):
        return False
    if not trace.where:
        return True  # the fault is of the whole trace
    return len(finding.rows & trace.where) > len(finding.rows) / 2


@exists
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form", "seed"), EXAM, ids=lambda value: str(value))
def test_a_planted_fault_is_found_and_named(kind, form, seed, tmp_path):
    trace = plant(kind, form, seed, tmp_path)
    findings = run_audit(trace)
    assert any(names(trace, finding) for finding in findings), f"{kind} in {form} at {sorted(trace.where)}: {findings}"


@exists
@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_trace_draws_no_finding(name, tmp_path):
    assert run_audit(honest(name, tmp_path)) == []


def rows_of(trace: Trace) -> Iterator[dict[str, Any]]:
    """The rows of a trace with the keys `prompt`, `text`, `gold` and `parts`, read here and by no reader of ours."""
    import pandas

    if trace.format == "trl":
        for path in sorted(trace.path.glob("completions/*.parquet")):
            for row in pandas.read_parquet(path).to_dict("records"):
                yield {"text": said(row["completion"]), "gold": row["answer"], "parts": row}
        return
    pattern = "**/*rollouts.jsonl" if trace.format == "verifiers" else "*.jsonl"
    files = [trace.path] if trace.path.is_file() else sorted({*trace.path.glob(pattern), *trace.path.glob("*.jsonl")})
    for row in (json.loads(line) for path in files for line in path.read_text().splitlines()):
        if trace.format == "verl":
            yield {"text": row["output"], "gold": row["gts"], "parts": row}
        elif trace.format == "verifiers":
            yield {"text": said(row["completion"]), "gold": row["answer"], "parts": row}
        else:
            texts = [part["text"] for item in row["response"]["output"] for part in item.get("content", ())]
            yield {"text": texts[-1], "gold": row["expected_answer"], "parts": row}


def said(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def scored_again(trace: Trace, rows: list[dict[str, Any]]) -> Iterable[tuple[str, list[float], list[float]]]:
    """Each reward's name, what is recorded, and what its function returns now."""
    for name, where in trace.rewards.items():
        file, function = where.rsplit(":", 1)
        spec = importlib.util.spec_from_file_location("rewards_of_trace", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        texts, golds = [row["text"] for row in rows], [row["gold"] for row in rows]
        again = getattr(module, function)(texts, answer=golds)
        recorded = [row["parts"][name] for row in rows]
        yield name, [without_none(value) for value in recorded], [without_none(value) for value in again]


def without_none(value: float | None) -> float:
    return -1.0 if value is None or math.isnan(value) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_the_rewards_of_honest_traces_are_true(name, tmp_path):
    trace = honest(name, tmp_path)
    rows = list(rows_of(trace))
    assert len(rows) >= 60
    for reward, recorded, again in scored_again(trace, rows):
        assert recorded == again, reward
        assert len(set(recorded)) > 1, reward


HACKED = ("format_without_answer", "empty_rewarded", "copied_from_prompt", "repeated_text")


@pytest.mark.slow
@pytest.mark.parametrize("kind", HACKED)
def test_hacked_rewards_are_what_their_functions_return(kind, tmp_path):
    trace = plant(kind, "verl", 0, tmp_path)
    for reward, recorded, again in scored_again(trace, list(rows_of(trace))):
        assert recorded == again, reward


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_planted_where_it_says(kind, tmp_path: Path):
    for form in KINDS[kind].formats:
        folder = tmp_path / form
        folder.mkdir()
        trace = plant(kind, form, 0, folder)
        assert trace.path.exists()
        for file, row in trace.where:
            path = trace.path if form == "gym" else trace.path / file
            assert path.exists()
            if path.suffix == ".jsonl":
                assert row < len(path.read_text().splitlines())


def test_the_exam_has_200_faults_of_every_kind():
    assert len(EXAM) == len(set(EXAM)) == 200
    assert {kind for kind, _, _ in EXAM} == set(KINDS)
    assert {form for _, form, _ in EXAM} == {"trl", "verl", "verifiers", "gym"}
    assert len(HONEST) >= 10
    assert all(what.source.startswith("https://") for what in KINDS.values())
