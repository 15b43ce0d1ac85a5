"""Bugs that others reported, rebuilt from the text of their issue: the audit names each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rewards.audit.audit import audit
from rewards.audit.options import AuditConfig
from rewards.finding import Finding


def findings(path: Path, *rows: dict[str, Any]) -> dict[str, Finding]:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {finding.kind: finding for finding in audit(path, AuditConfig()).findings}


def test_trl_6427_doing_nothing_is_rewarded(tmp_path: Path) -> None:
    """The environment's reward starts at 0.0 and is taken for a judgement; who tries and fails gets -1.0."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "submit", "arguments": "{}"}]}
    wait = {"role": "assistant", "content": "I think about it.", "tool_calls": None}
    prompt = [{"role": "user", "content": "Fix the test."}]
    group = [(wait, 0.0, 1.0), (call, -1.0, -1.0), (call, -1.0, -1.0), (wait, 0.0, 1.0)]
    rows = [
        {"step": 1, "prompt": prompt, "completion": [turn], "_outcome_only_reward_func": reward, "advantage": advantage}
        for turn, reward, advantage in group
    ]
    (finding,) = findings(tmp_path / "completions_00001.parquet", *rows).values()
    assert (finding.kind, len(finding.where)) == ("empty-rewarded", 2)


def test_trl_6369_the_denominator_counts_masked_tokens(tmp_path: Path) -> None:
    """`mask_truncated_completions` takes cut completions out of the numerator of dapo's loss alone."""
    lengths = [20, 50, 30, 50]
    rows = [
        {
            "prompt": "q",
            "completion": f"text {i}",
            "reward": float(i % 2),
            "step": 1,
            "token_ids": [7 + i] * length,
            "finish_reason": "length" if length == 50 else "stop",
            "loss_mask": [int(length < 50)] * length,
            "loss_denominator": sum(lengths),
        }
        for i, length in enumerate(lengths)
    ]
    assert set(findings(tmp_path / "rollouts.jsonl", *rows)) == {"masked-in-denominator"}
    for row in rows:
        row["loss_denominator"] = 50  # as it was mended
    assert findings(tmp_path / "rollouts.jsonl", *rows) == {}


def test_benchflow_1071_a_timeout_is_graded(tmp_path: Path) -> None:
    """An agent that never began is recorded as a timeout with reward 0."""
    response = {"output": [], "error": {"type": "timeout", "message": "Agent timed out after 14400s"}}
    row = {"response": response, "responses_create_params": {"input": "q"}, "reward": 0.0, "_ng_task_index": 0}
    found = findings(tmp_path / "rollouts.jsonl", row)
    assert "timed out after 14400s" in found["failure-as-number"].evidence
