"""Every trainer's recorded rollouts become the same rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from rewards.audit.traces import Trace, groups_of, read_traces

QUESTION = [{"role": "user", "content": "2 + 3?"}]
ANSWER = [{"role": "assistant", "content": "#### 5"}]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(path: Path) -> Trace:
    (trace,) = read_traces(path)
    return trace


def test_trl(tmp_path: Path) -> None:
    folder = tmp_path / "completions"
    folder.mkdir()
    for step in (2, 10, 11):  # 11 learns from the completions of 10 again
        text = "#### 5" if step == 2 else "#### 6"
        table = {"step": [step], "prompt": [QUESTION], "completion": [[{"role": "assistant", "content": text}]]}
        table |= {"right": [0.25], "format": [1.0 if step == 2 else math.nan], "extracted": ["5"], "advantage": [0.5]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"completions_{step:05d}.parquet")
    first, second = read_traces(folder)
    assert (first.step, second.step, first.prompt, first.completion) == (2, 10, "2 + 3?", "#### 5")
    assert first.parts == {"right": 0.25, "format": 1.0}
    assert first.reward == 1.25
    assert second.reward == 0.25
    assert second.advantage == 0.5
    assert second.columns == {"extracted": "5"}


def test_trl_with_a_function_that_is_called_reward(tmp_path: Path) -> None:
    table = {"step": [1], "prompt": [QUESTION], "completion": [ANSWER], "reward": [0.25], "style": [1.0]}
    path = tmp_path / "completions_00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table | {"advantage": [0.5]}), path)
    row = only(tmp_path)
    assert (row.form, row.reward, row.parts) == ("trl", 1.25, {"reward": 0.25, "style": 1.0})


def test_verl(tmp_path: Path) -> None:
    rows = [
        {"input": "2 + 3?", "output": "5", "gts": "5", "score": 1.0, "step": 3, "uid": f"q7_{i}_0"} for i in range(2)
    ]
    traces = read_traces(lines(tmp_path / "3.jsonl", *rows))
    assert [(t.group, t.sample, t.step, t.reward) for t in traces] == [("q7", 0, 3, 1.0), ("q7", 1, 3, 1.0)]
    assert traces[0].columns["gts"] == "5"
    assert len(groups_of(traces)) == 1
    rows = [{"input": text, "output": "5", "gts": "5", "score": 1, "step": 1} for text in "aba"]  # without ids
    assert [len(group) for group in groups_of(read_traces(lines(tmp_path / "1.jsonl", *rows)))] == [2, 1]


def test_verifiers_episode(tmp_path: Path) -> None:
    asked = {"message": QUESTION[0], "token_ids": [1, 2], "mask": [False, False]}
    said = {"parent": 0, "sampled": True, "message": ANSWER[0], "token_ids": [9, 3, 4], "mask": [False, True, True]}
    nodes = [asked, said | {"logprobs": [-0.1, -0.2], "advantages": [0.5, 0.5]}]
    trace = {
        "nodes": nodes,
        "calls": [{"node": 1, "finish_reason": "length"}],
        "rewards": {"right": {"score": 1.0, "weight": 0.5}, "style": None},
        "errors": [{"type": "ToolError", "message": "gone"}],
    }
    run = {"type": "train", "id": "r", "work": {"type": "train", "step": 4, "policy": {"start": 2, "end": 3}}}
    task = {"type": "T", "data": {"answer": "5"}}
    (path := tmp_path / "rollouts/step_4/train/effective").mkdir(parents=True)
    lines(path / "traces.jsonl", {"id": "e", "task": task, "group": {"id": "g"}, "run": run, "traces": [trace]})
    lines(tmp_path / "rollouts/step_4/train/all/traces.jsonl", {"task": task, "traces": [trace, trace]})
    row = only(tmp_path)
    assert (row.group, row.step, row.version, row.reward, row.advantage) == ("g", 4, 2, 0.5, 0.5)
    assert (row.token_ids, row.logprobs, row.calls[0].prompt_ids) == ([3, 4], [-0.1, -0.2], [1, 2, 9])
    assert (row.finish_reason, row.error, row.columns["answer"]) == ("length", "ToolError: gone", "5")
    judge = trace | {"agent": {"name": "judge", "trainable": False}}
    again = {"id": "e", "task": task, "run": run, "errors": trace["errors"], "traces": [trace | {"ok": True}, judge]}
    row = only(lines(tmp_path / "again.jsonl", again))
    assert row.error is None  # it was tried again, and a judge learns nothing


def test_verifiers_results(tmp_path: Path) -> None:
    row = {"example_id": 7, "prompt": QUESTION, "completion": ANSWER, "answer": "5", "reward": 1.0, "right": 1.0}
    row |= {"metrics": {"right": 1.0}, "is_completed": True, "is_truncated": False, "error": None}
    tokens = {"prompt_ids": [1], "completion_ids": [2], "completion_logprobs": [-0.5]}
    row["trajectory"] = [{"tokens": tokens}]
    trace = only(lines(tmp_path / "results.jsonl", row))
    assert (trace.group, trace.parts, trace.finish_reason, trace.completion) == ("7", {"right": 1.0}, "stop", "#### 5")
    assert trace.calls[0].prompt_ids == [1]
    assert trace.logprobs == [-0.5]
    assert trace.columns["answer"] == "5"


def test_nemo_gym(tmp_path: Path) -> None:
    call = {"type": "function_call", "name": "sum", "arguments": "{}"}
    output = [
        {"type": "reasoning", "summary": [{"text": "add"}]},
        call | {"prompt_token_ids": [1], "generation_token_ids": [2]},
        {"type": "function_call_output", "output": "5"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "#### 5"}]},
    ]
    row = {
        "responses_create_params": {"input": QUESTION},
        "response": {"output": output, "incomplete_details": {"reason": "max_output_tokens"}, "created_at": 9.0},
        "reward": 1.0,
        "expected_answer": "5",
        "_ng_task_index": 3,
        "_ng_rollout_index": 1,
    }
    trace = only(lines(tmp_path / "rollouts.jsonl", row))
    assert (trace.prompt, trace.completion, trace.group, trace.sample) == ("2 + 3?", "#### 5", "3", 1)
    assert (trace.finish_reason, trace.time, trace.calls[0].token_ids) == ("length", 9.0, [2])
    assert [turn["role"] for turn in trace.turns] == ["assistant", "tool", "assistant"]
    assert trace.turns[0]["reasoning_content"] == "add"
    assert "reasoning_content" not in trace.turns[2]


def test_quartet(tmp_path: Path) -> None:
    row = {"prompt_id": "train/1", "prompt": "2 + 3?", "text": "#### 5", "token_ids": [4], "logprobs": [-0.1]}
    row |= {"reward": None, "parts": {"right": None}, "extras": {}, "advantage": 0.0, "finish_reason": "stop"}
    row["policy_version"] = 6
    content = "".join(json.dumps(row | {"sample": sample}) + "\n" for sample in (0, 1, 0, 1))
    (tmp_path / "rollouts").mkdir()
    path = tmp_path / "rollouts/step_000007.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(content.encode()))
    traces = read_traces(tmp_path)
    assert [len(group) for group in groups_of(traces)] == [2, 2]  # the same prompt twice
    assert (traces[0].step, traces[0].reward, traces[0].version) == (7, None, 6)


def test_common_with_numbers_times_and_messages_in_other_forms(tmp_path: Path) -> None:
    row = {"prompt": "2 + 3?", "completion": ANSWER, "reward": 1, "step": "12", "time": "2026-01-31T12:00:00+00:00"}
    trace = only(lines(tmp_path / "mine.jsonl", row))
    assert (trace.step, trace.time, trace.unread) == (12, 1769860800.0, {})
    sharegpt = {"prompt": [{"from": "human", "value": "2 + 3?"}], "completion": [{"from": "gpt", "value": "#### 5"}]}
    without_roles = {"prompt": [{"content": "2 + 3?"}], "completion": [{"content": "#### 5"}]}
    for messages in (sharegpt, without_roles):
        trace = only(lines(tmp_path / "mine.jsonl", row | messages))
        assert (trace.prompt, trace.completion) == ("2 + 3?", "#### 5")


@pytest.mark.parametrize("field", ["weights", "logprobs", "token_ids"])
def test_a_field_of_another_kind_is_named_with_its_row(tmp_path: Path, field: str) -> None:
    row = {"prompt": "2 + 3?", "completion": "#### 5", "reward": 1.0, "rewards": {"right": 1.0}, field: "1, 2"}
    with pytest.raises(ValueError, match=f"row 1: no row of common: ValueError: {field} is a str"):
        read_traces(lines(tmp_path / "mine.jsonl", row))


def test_a_list_on_one_line_is_no_half_line(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps([{"prompt": "2 + 3?", "completion": "#### 5", "reward": 1.0}]))
    with pytest.raises(ValueError, match="line 1 is damaged: it holds a list, not an object"):
        read_traces(tmp_path)


def test_common(tmp_path: Path) -> None:
    row = {"prompt": "2 + 3?", "completion": ANSWER, "reward": "TimeoutError: 10 s", "rewards": {"right": 1}}
    trace = only(lines(tmp_path / "mine.jsonl", row | {"answer": "5"}))
    assert trace.reward is None
    assert trace.unread == {"reward": "TimeoutError: 10 s"}
    assert (trace.completion, trace.parts, trace.columns) == ("#### 5", {"right": 1.0}, {"answer": "5"})


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there are no rollouts"):
        read_traces(tmp_path)
    with pytest.raises(ValueError, match="empty.jsonl: there are no rollouts"):
        read_traces(lines(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"x.jsonl: its columns are a, b; expected rollouts of TRL"):
        read_traces(lines(tmp_path / "x.jsonl", {"a": 1, "b": 2}))
    row = {"prompt": "a", "completion": "b", "reward": 1}
    with pytest.raises(ValueError, match=r"y.jsonl, row 2: no row of common: KeyError: 'completion'"):
        read_traces(lines(tmp_path / "y.jsonl", row, {"prompt": "a"}))
    whole = lines(tmp_path / "z.jsonl", row)
    whole.write_text(whole.read_text() + '{"prompt": "ha')
    assert len(read_traces(whole)) == 1  # its writer was killed
    whole.write_text('{"prompt": "ha\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="z.jsonl, line 1 is damaged"):
        read_traces(whole)
