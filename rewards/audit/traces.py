"""Rollouts that a trainer has recorded, read into rows of one form, whoever wrote them.

The forms come from what writes them: TRL's `log_completions` (trl/trainer/grpo_trainer.py, `GRPOTrainer.log`), verl's
`trainer.rollout_data_dir` (verl/trainer/ppo/ray_trainer.py, `_write_generations`), the episodes of verifiers and
prime-rl (verifiers/v1/episode.py, verifiers/v1/trace.py; prime-rl/src/prime_rl/monitors/file.py) and the results of
verifiers before them (verifiers/legacy/utils/save_utils.py, `state_to_output`), NeMo-Gym's rollouts (`example_rollouts.
jsonl` of each of its environments), and rollouts/step_*.jsonl.zst of a run of ours. Anybody else writes `COMMON`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

ENDINGS = (".parquet", ".jsonl", ".jsonl.zst")
LIMITS = {"length", "max_tokens", "max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens"}
CUT = LIMITS | {"context_length", "prompt_too_long", "incomplete", "truncated"}  # finish reasons of what a limit ended
FAILED = {"error", "timeout", "abort", "aborted", "failed", "has_error", "timeout_reached"}
Message = dict[str, Any]


@dataclass
class Call:
    """A model was called once: with this prompt it wrote this. What was not recorded is empty."""

    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt: list[Message] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)


@dataclass
class Trace:
    """A rollout has this prompt, completion and reward. What its writer did not record is None or empty.

    `parts` are the values of each reward function, and `weights` what they are multiplied with where that is known.
    `turns` are the messages of the completion. `token_ids`, `logprobs` and `loss_mask` are those of the completion.
    `unread` holds what stands where a number should.
    """

    file: str
    row: int  # from 1
    form: str
    prompt: str
    completion: str
    messages: list[Message] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    reward: float | None = None
    parts: dict[str, float | None] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    advantage: float | None = None
    group: str | None = None
    sample: int | None = None
    step: int | None = None
    version: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    loss_denominator: float | None = None
    calls: list[Call] = field(default_factory=list)
    time: float | None = None
    split: str = "train"
    columns: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, Any] = field(default_factory=dict)

    def number(self, name: str, value: Any) -> float | None:
        """Returns a value as a number; one that is none is remembered as `unread`."""
        if value is None or isinstance(value, int | float):
            return None if value is None else float(value)
        self.unread[name] = value
        return None

    @property
    def length(self) -> int:
        """The number of tokens, or of characters where no tokens were recorded."""
        return len(self.token_ids) or len(self.completion)

    @property
    def place(self) -> str:
        return f"{self.file}:{self.row}"


def read_traces(path: Path, split: str = "train") -> list[Trace]:
    """The rollouts in a file, or in all files of a folder, in the order of the numbers in their names.

    Raises FileNotFoundError where there are none, ValueError naming file and line of what cannot be read.
    """
    traces: list[Trace] = []
    for file in trace_files(path):
        rows = list(_rows(file))
        form = _form(rows[0]) if rows else ""
        if rows and form not in FORMS:
            known = "rollouts of TRL, verl, verifiers, prime-rl, NeMo-Gym or quartet, or `prompt` and `completion`"
            raise ValueError(f"{file}: its columns are {', '.join(rows[0])[:200]}; expected {known}")
        for number, row in enumerate(rows, start=1):
            try:
                traces += FORMS[form](row, str(file), number)
            except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
                raise ValueError(f"{file}, row {number}: no row of {form}: {type(error).__name__}: {error}") from error
    for trace in traces:
        trace.split = split if split != "train" else trace.split
    return _without_repeats(traces)


def trace_files(path: Path) -> list[Path]:
    """The files of rollouts that `path` is or holds, in the order of the numbers in their names."""
    if path.is_file():
        return [path]
    if (path / "rollouts").is_dir():
        path = path / "rollouts"
    files = [file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file()]
    chosen = [file for file in files if "effective" in file.parts]  # prime-rl records those of a batch in `all` too
    files = chosen + [file for file in files if chosen and file.parts[-3:-2] == ("eval",)] if chosen else files
    files = [file for file in files if file.name not in ("metrics.jsonl", "events.jsonl")]
    if not files:
        raise FileNotFoundError(f"{path}: there are no rollouts ({', '.join(ENDINGS)})")
    return sorted(dict.fromkeys(files), key=lambda file: [int(n) for n in re.findall(r"\d+", str(file))] or [0])


def groups_of(traces: Iterable[Trace]) -> list[list[Trace]]:
    """The rollouts of each group: of one prompt in one step where no group was recorded."""
    groups: dict[Any, list[Trace]] = {}
    for trace in traces:
        groups.setdefault((trace.split, trace.step, trace.group or trace.prompt), []).append(trace)
    return list(groups.values())


def text_of(content: Any) -> str:
    """The text of a message's content, of a message, or of messages.

    >>> text_of([{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}])
    '2 + 3?'
    """
    if isinstance(content, list):
        return "\n".join(filter(None, map(text_of, content)))
    if isinstance(content, Mapping):
        return text_of(content.get("content") or content.get("text") or content.get("output") or "")
    return "" if content is None else str(content)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Half a line at the end, of a writer that was killed, is left out."""
    if file.suffix == ".parquet":
        yield from _package("pyarrow.parquet", "pyarrow").read_table(file).to_pylist()
        return
    content = file.read_bytes()
    if file.suffix == ".zst":
        content = _package("zstandard", "zstandard").ZstdDecompressor().decompressobj().decompress(content)
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"it holds a {type(row).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                continue
            raise ValueError(f"{file}, line {number} is damaged: {error}") from error
        yield row


def _package(module: str, package: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ValueError(f"these rollouts are read with {package}: pip install {package}") from error


def _form(row: Mapping[str, Any]) -> str:
    """The name of the form that has these columns."""
    marks = {
        "nemo_gym": {"response", "reward"},
        "verifiers": {"traces", "task"},
        "quartet": {"prompt_id", "sample", "text", "parts"},
        "verl": {"input", "output", "score"},
        "verifiers_results": {"example_id", "completion", "reward"},
        "common": {"prompt", "completion", "reward"},
        "trl": {"step", "prompt", "completion", "advantage"},
    }
    return next((name for name, columns in marks.items() if columns <= row.keys()), ", ".join(row)[:80])


def _messages(value: Any) -> list[Message]:
    """Messages without the keys that a table had to add."""
    if not isinstance(value, list):
        return []
    return [{key: entry for key, entry in message.items() if entry is not None} for message in value]


def _rest(row: Mapping[str, Any], *known: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in known}


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _trl(row: dict[str, Any], file: str, number: int) -> Iterator[Trace]:
    """The columns of numbers are its reward functions; a sum of them was not recorded. A column of another type was
    logged by one of them (`log_extra`)."""
    trace = Trace(file, number, "trl", text_of(row["prompt"]), text_of(row["completion"]))
    trace.messages, trace.turns = _messages(row["prompt"]), _messages(row["completion"])
    trace.step = _whole(row["step"])
    trace.advantage = trace.number("advantage", row["advantage"])
    for name, value in _rest(row, "step", "prompt", "completion", "advantage").items():
        if value is None or isinstance(value, float):
            trace.parts[name] = value
        else:
            trace.columns[name] = value
    marks = [mark for mark in trace.parts.values() if mark is not None and mark == mark]
    trace.reward = sum(marks) if marks else None
    yield trace


def _verl(row: dict[str, Any], file: str, number: int) -> Iterator[Trace]:
    trace = Trace(file, number, "verl", text_of(row["input"]), text_of(row["output"]), step=_whole(row.get("step")))
    trace.reward = trace.number("score", row["score"])
    trace.columns = _rest(row, "input", "output", "score", "step")
    key = re.fullmatch(r"(.+)_(\d+)_\d+", str(row.get("uid")))  # of a sample, its rollout and the output of it
    trace.group = key[1] if key else row.get("uid")
    trace.sample = int(key[2]) if key else None
    for name in ("advantage", "advantages"):
        trace.advantage = trace.number(name, trace.columns.pop(name, trace.advantage))
    trace.finish_reason = trace.columns.get("finish_reason")
    trace.error = _error(trace.columns.get("error"))
    yield trace


def _verifiers(row: dict[str, Any], file: str, number: int) -> Iterator[Trace]:
    """An episode has the traces of one agent or several. Its nodes are messages, each with the tokens it added."""
    work = (row.get("run") or {}).get("work") or {}
    for record in row["traces"]:
        nodes = record.get("nodes") or []
        calls = [_call(nodes, index) for index, node in enumerate(nodes) if node.get("sampled")]
        path = _path(nodes, len(nodes) - 1)
        first = next((place for place, node in enumerate(path) if node.get("sampled")), len(path))
        messages, turns = ([node["message"] for node in part] for part in (path[:first], path[first:]))
        written = text_of([turn for turn in turns if turn.get("role") == "assistant"])
        trace = Trace(file, number, "verifiers", text_of(messages), written, messages, turns, calls=calls)
        task = record.get("task") or row["task"]
        trace.group = (row.get("group") or {}).get("id") or task.get("key") or task.get("hash")
        trace.step, trace.version = work.get("step"), (work.get("policy") or {}).get("start")
        trace.split = "evaluation" if work.get("type") == "eval" else "train"
        rewards = {name: value for name, value in (record.get("rewards") or {}).items() if value is not None}
        trace.parts = {name: trace.number(name, value["score"]) for name, value in rewards.items()}
        trace.weights = {name: value.get("weight", 1.0) for name, value in rewards.items()}
        marks = [mark * trace.weights[name] for name, mark in trace.parts.items() if mark is not None]
        trace.reward = trace.number("reward", record.get("reward", sum(marks) if marks else None))
        credit = [value for node in nodes for value in node.get("advantages") or []]
        trace.advantage = trace.number("advantage", record.get("advantage"))
        if credit:
            trace.advantage = sum(credit) / len(credit)
        trace.token_ids = [token for call in calls for token in call.token_ids]
        trace.logprobs = [value for node in nodes for value in node.get("logprobs") or []]
        endings = [call.get("finish_reason") for call in record.get("calls") or [] if not call.get("error")]
        stop = record.get("stop_condition")
        trace.finish_reason = stop if stop in CUT | FAILED else endings[-1] if endings else stop
        trace.error = _error(next(reversed(record.get("errors") or row.get("errors") or []), None))
        trace.time = (record.get("timing") or {}).get("start")
        trace.columns = dict(task.get("data") or {}) | (record.get("metrics") or {}) | {"timing": record.get("timing")}
        yield trace


def _path(nodes: Sequence[Mapping[str, Any]], index: int | None) -> list[Mapping[str, Any]]:
    path = []
    while index is not None and 0 <= index < len(nodes) and len(path) <= len(nodes):
        path.insert(0, nodes[index])
        index = nodes[index].get("parent")
    return path


def _call(nodes: Sequence[Mapping[str, Any]], index: int) -> Call:
    *before, node = _path(nodes, index)
    ids, mask = node.get("token_ids") or [], node.get("mask") or []
    start = mask.index(True) if True in mask else len(ids)
    prompt_ids = [token for each in before for token in each.get("token_ids") or []] + ids[:start]
    return Call(prompt_ids, ids[start:], [each["message"] for each in before], [node["message"]])


def _verifiers_results(row: dict[str, Any], file: str, number: int) -> Iterator[Trace]:
    prompt, completion = row.get("prompt"), row["completion"]
    turns = _messages(completion)
    written = [turn for turn in turns if turn.get("role") == "assistant"] if turns else completion
    trace = Trace(file, number, "verifiers_results", text_of(prompt), text_of(written), _messages(prompt), turns)
    trace.group = str(row["example_id"])
    trace.reward = trace.number("reward", row["reward"])
    trace.advantage = trace.number("advantage", row.get("advantage"))
    metrics = row.get("metrics") or {}
    trace.parts = {name: trace.number(name, value) for name, value in metrics.items()}
    stop = row.get("stop_condition")
    trace.finish_reason = "length" if row.get("is_truncated") else stop or ("stop" if row.get("is_completed") else None)
    trace.error = _error(row.get("error"))
    timing = row.get("timing") or {}
    trace.time = timing.get("start_time") or timing.get("start")
    for step in row.get("trajectory") or []:
        tokens = step.get("tokens") or {}
        trace.calls.append(
            Call(
                tokens.get("prompt_ids") or [],
                tokens.get("completion_ids") or [],
                _messages(step.get("prompt")),
                _messages(step.get("completion")),
            )
        )
        trace.logprobs += tokens.get("completion_logprobs") or []
        trace.token_ids += tokens.get("completion_ids") or []
    trace.step, trace.version = _whole(row.get("step")), _whole(row.get("policy_version"))
    trace.columns = _rest(row, "prompt", "completion", "reward", "trajectory", "metrics", *metrics)
    yield trace


def _nemo_gym(row: dict[str, Any], file: str, number: int) -> Iterator[Trace]:
    response = row["response"] or {}
    asked = (row.get("responses_create_params") or {}).get("input") or []
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else _messages(asked)
    turns: list[Message] = []
    calls: list[Call] = []
    logprobs: list[float] = []
    thought = ""
    for item in response.get("output") or [{"type": "message", "content": response.get("output_text") or ""}]:
        if "generation_token_ids" in item:
            calls.append(Call(item.get("prompt_token_ids") or [], item["generation_token_ids"] or []))
            logprobs += item.get("generation_log_probs") or []
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought = text_of(item.get("summary") or item.get("content"))
            continue
        role = "tool" if kind == "function_call_output" else item.get("role", "assistant")
        turn = {"role": role, "content": text_of(item)}
        if kind == "function_call":
            turn["tool_calls"] = [{"name": item.get("name"), "arguments": item.get("arguments")}]
        turns.append(turn | ({"reasoning_content": thought} if thought and role == "assistant" else {}))
        thought = "" if role == "assistant" else thought
    written = text_of([turn for turn in turns if turn["role"] == "assistant"])
    trace = Trace(file, number, "nemo_gym", text_of(messages), written, messages, turns, calls=calls)
    trace.logprobs, trace.token_ids = logprobs, [token for call in calls for token in call.token_ids]
    trace.reward = trace.number("reward", row["reward"])
    trace.advantage = trace.number("advantage", row.get("advantage"))
    task = row.get("_ng_task_index", row.get("task_index"))
    trace.group, trace.sample = None if task is None else str(task), _whole(row.get("_ng_rollout_index"))
    trace.step, trace.version = _whole(row.get("step")), _whole(row.get("policy_version"))
    details = response.get("incomplete_details") or {}
    cut = bool(details) or response.get("status") == "incomplete"
    trace.finish_reason = "length" if cut else response.get("finish_reason") or response.get("status")
    trace.error = _error(response.get("error") or row.get("error"))
    trace.time = response.get("created_at") or None
    trace.columns = _rest(row, "response", "responses_create_params", "reward", "advantage")
    yield trace


def _quartet(row: dict[str, Any], file: str, number: int) -> Iterator[Trace]:
    trace = Trace(
        file, number, "quartet", row["prompt"], row["text"], row.get("messages") or [], row.get("turns") or []
    )
    name = re.search(r"step_(\d+)\.jsonl", file)
    trace.step = int(name[1]) if name else None
    trace.reward = trace.number("reward", row.get("reward"))
    trace.parts = {part: trace.number(part, value) for part, value in row["parts"].items()}
    trace.advantage = trace.number("advantage", row.get("advantage"))
    trace.sample, trace.version = row["sample"], row.get("policy_version")
    trace.group = f"{row['prompt_id']}/{number - row['sample']}"  # a prompt may be drawn twice in a step
    trace.finish_reason, trace.token_ids = row.get("finish_reason"), row.get("token_ids") or []
    trace.logprobs = row.get("logprobs") or []
    failure = (row.get("tools") or {}).get("failure")
    trace.error = _error(failure)
    trace.columns = {"prompt_id": row["prompt_id"], "policy_logprobs": row.get("policy_logprobs")} | row["extras"]
    yield trace


COMMON = (
    "prompt", "completion", "reward", "rewards", "weights", "advantage", "group", "sample", "step", "version",
    "finish_reason", "error", "prompt_ids", "token_ids", "logprobs", "loss_mask", "loss_denominator", "calls", "time",
    "split",
)  # fmt: skip


def _common(row: dict[str, Any], file: str, number: int) -> Iterator[Trace]:
    """Our own form for others: the names of `Trace`, of which `prompt`, `completion` and `reward` are needed."""
    turns = _messages(row["completion"])
    written = [turn for turn in turns if turn.get("role") == "assistant"] if turns else row["completion"]
    trace = Trace(file, number, "common", text_of(row["prompt"]), text_of(written), _messages(row["prompt"]), turns)
    trace.reward = trace.number("reward", row["reward"])
    trace.parts = {name: trace.number(name, value) for name, value in (row.get("rewards") or {}).items()}
    trace.weights = row.get("weights") or {}
    for name in ("advantage", "loss_denominator", "time"):
        setattr(trace, name, trace.number(name, row.get(name)))
    for name in ("sample", "step", "version"):
        setattr(trace, name, _whole(row.get(name)))
    for name in ("prompt_ids", "token_ids", "logprobs", "loss_mask"):
        setattr(trace, name, row.get(name) or [])
    trace.group = None if row.get("group") is None else str(row["group"])
    trace.finish_reason, trace.error = row.get("finish_reason"), _error(row.get("error"))
    trace.calls = [Call(**call) for call in row.get("calls") or []]
    trace.split = row.get("split") or "train"
    trace.columns = _rest(row, *COMMON)
    yield trace


FORMS = {
    "trl": _trl,
    "verl": _verl,
    "verifiers": _verifiers,
    "verifiers_results": _verifiers_results,
    "nemo_gym": _nemo_gym,
    "quartet": _quartet,
    "common": _common,
}


def _error(value: Any) -> str | None:
    """What failed, in one line; None where nothing did."""
    if isinstance(value, Mapping):
        parts = [value.get("type") or value.get("kind") or value.get("error"), value.get("message")]
        return ": ".join(str(part) for part in parts if part) or None
    return str(value) if value else None


def _without_repeats(traces: list[Trace]) -> list[Trace]:
    """TRL logs the completions of one generation at each of the steps that learn from it: the first of them stays."""
    stays: list[Trace] = []
    last: list[tuple[str, str, float | None]] = []
    for _, group in groupby(traces, key=lambda trace: (trace.file, trace.step)):
        step = list(group)
        content = [(trace.prompt, trace.completion, trace.advantage) for trace in step]
        if step[0].form != "trl" or content != last:
            stays += step
        last = content
    return stays
