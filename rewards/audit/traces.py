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
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from glob import escape
from itertools import combinations, groupby, pairwise
from pathlib import Path
from typing import Any

import zstandard

ENDINGS = (".parquet", ".jsonl", ".jsonl.zst")
LIMITS = {"length", "max_tokens", "max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens"}
CUT = LIMITS | {"context_length", "prompt_too_long", "incomplete", "truncated"}  # finish reasons of what a limit ended
BESIDE = ("metrics.jsonl", "events.jsonl", "_materialized_inputs.jsonl", "_failures.jsonl", "_profiling.jsonl")
FAILED = {"error", "timeout", "abort", "aborted", "failed", "has_error", "timeout_reached"}
SAME_ADVANTAGE = 1e-6
FEW_PAIRS = 8  # of rollouts with equal rewards, fewer may agree by chance
LOOKED_AT = 32  # rollouts of a group
MOST_BYTES = 2**29  # of a file when it is unpacked
MOST_SHOWN = 400  # characters of a text in a report
Message = dict[str, Any]
LISTS_AND_TABLES: dict[str, type] = {
    **dict.fromkeys(("prompt_ids", "token_ids", "logprobs", "loss_mask"), list),
    **dict.fromkeys(("weights", "columns"), dict),
}


@dataclass
class Call:
    """A model was called once: with this prompt it wrote this. What was not recorded is empty."""

    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt: list[Message] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)


@dataclass(eq=False)
class Trace:
    """A rollout has this prompt, completion and reward. What its writer did not record is None or empty.

    `parts` are the values of each reward function, and `weights` what they are multiplied with where that is known.
    `turns` are the messages of the completion. `token_ids`, `logprobs` and `loss_mask` are those of the completion.
    `identity` is that of the rollout alone. `counted` is the number of tokens that the record speaks of, and `at_limit`
    tells that there are as many as allowed. `unread` holds what stands where a number should. `missing` rollouts of the
    same group are recorded elsewhere as failed.
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
    identity: str | None = None
    counted: int | None = None
    at_limit: bool = False
    missing: int = 0
    split: str = "train"
    columns: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, Any] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        return self.reward is not None and math.isfinite(self.reward)

    @property
    def value(self) -> float:
        """The reward, and 0 where there is none."""
        return self.reward if self.reward is not None and math.isfinite(self.reward) else 0.0

    @property
    def credit(self) -> float:
        """The advantage, and 0 where there is none."""
        return self.advantage if self.advantage is not None and math.isfinite(self.advantage) else 0.0

    @property
    def length(self) -> int:
        """The number of tokens, or of characters where no tokens were recorded."""
        return len(self.token_ids) or len(self.completion)

    @property
    def key(self) -> str:
        return f"{self.file}:{self.row}"

    @property
    def place(self) -> str:
        return f"{Path(self.file).name}:{self.row}"

    def as_row(self) -> dict[str, Any]:
        """Return the row of a report. A number that is not finite is null."""
        names = ("step", "group", "finish_reason", "error")
        numbers = {"reward": self.reward, "advantage": self.advantage, **self.parts}
        finite = {
            name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()
        }
        texts = {"prompt": self.prompt[-MOST_SHOWN:], "completion": self.completion[:MOST_SHOWN]}
        return {name: getattr(self, name) for name in names} | finite | texts


def read_traces(path: Path, split: str = "train") -> list[Trace]:
    """The rollouts in a file, or in all files of a folder, in the order of the numbers in their names.

    Raises FileNotFoundError where there are none, ValueError naming file and line of what cannot be read.
    """
    traces: list[Trace] = []
    for file in trace_files(path):
        new = traces_of(file, list(_rows(file)))
        failures = file.with_name(f"{file.stem}_failures.jsonl")  # NeMo-Gym's, beside the rollouts
        if failures.is_file():
            failed = Counter(str(row.get("_ng_task_index")) for row in _rows(failures))
            new = [replace(trace, missing=failed[str(trace.group)]) for trace in new]
        traces += new
    for trace in traces:
        trace.split = split if split != "train" else trace.split
    if not traces:
        raise ValueError(f"{path}: there are no rollouts: what is there is empty")
    for _, of_file in groupby(traces, key=lambda trace: trace.file):
        _leave_out_logged(list(of_file))
    return _without_repeats(traces)


def traces_of(file: Path, rows: Sequence[dict[str, Any]]) -> list[Trace]:
    """The rollouts in the rows of a file. Raises ValueError for a form that is not known, and for a row of another."""
    form = _form(rows[0]) if rows else ""
    if rows and form not in FORMS:
        forms = "rollouts of TRL, verl, verifiers, prime-rl, NeMo-Gym or quartet, or `prompt` and `completion`"
        raise ValueError(f"{file}: its columns are {', '.join(rows[0])[:200]}; expected {forms}")
    traces: list[Trace] = []
    for number, row in enumerate(rows, start=1):
        try:
            traces += [_trace(str(file), number, form, fields) for fields in FORMS[form](row)]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file}, row {number}: no row of {form}: {type(error).__name__}: {error}") from error
    started = 0
    for trace in traces if form == "quartet" else ():
        started += trace.sample == 0  # a group begins with its sample 0; a prompt may be drawn twice in a step
        trace.group = f"{trace.group}/{started}"
    return traces


def recorded_means(path: Path) -> dict[str, float]:
    """The mean reward that verifiers or NeMo-Gym recorded beside the rollouts, by the name of the file."""
    folder, stem = (path, "*") if path.is_dir() else (path.parent, escape(path.stem))
    means = {}
    for file in [*folder.glob("metadata.json"), *folder.glob(f"{stem}_aggregate_metrics.json")]:
        with suppress(ValueError, TypeError, AttributeError):  # another tool's file of this name
            content = json.loads(file.read_text(encoding="utf-8"))
            [entry] = content if isinstance(content, list) else [content]
            means[file.name] = float(entry.get("avg_reward", entry.get("agent_metrics", {}).get("mean/reward")))
    return means


def trace_files(path: Path) -> list[Path]:
    """The files of rollouts that `path` is or holds, in the order of the numbers in their names."""
    if path.is_file():
        return [path]
    if (path / "rollouts").is_dir():
        path = path / "rollouts"
    files = [file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file()]
    effective = [file for file in files if "effective" in file.parts]  # prime-rl records those of a batch in `all` too
    files = effective + [file for file in files if effective and file.parts[-3:-2] == ("eval",)] if effective else files
    files = [file for file in files if not file.name.endswith(BESIDE)]
    if not files:
        raise FileNotFoundError(f"{path}: there are no rollouts ({', '.join(ENDINGS)})")
    return sorted(dict.fromkeys(files), key=lambda file: [int(n) for n in re.findall(r"\d+", str(file))] or [0])


def groups_of(traces: Iterable[Trace]) -> list[list[Trace]]:
    """The rollouts of each group: of one prompt in one step where no group was recorded.

    Data may hold a prompt twice. Its rollouts in a step are then several groups, if they stand in blocks of the usual
    size."""
    together: dict[Any, list[Trace]] = {}
    for trace in traces:
        together.setdefault((trace.split, trace.step, trace.group or trace.prompt), []).append(trace)
    sizes = Counter(len(group) for group in together.values())
    size = max(sizes, key=sizes.__getitem__, default=0)  # the first of equals
    groups: list[list[Trace]] = []
    for group in together.values():
        if group[0].group is None and len(group) > size > 1 and _stands_in_blocks(group, size):
            groups += [group[start : start + size] for start in range(0, len(group), size)]
        else:
            groups.append(group)
    return groups


def _stands_in_blocks(group: Sequence[Trace], size: int) -> bool:
    """Return whether rollouts of one prompt are in blocks of neighbouring rows, each a multiple of `size` long."""
    starts = [0]
    for place, (before, after) in enumerate(pairwise(group), start=1):
        if (after.file, after.row) != (before.file, before.row + 1):
            starts.append(place)
    return all((end - start) % size == 0 for start, end in pairwise([*starts, len(group)]))


def text_of(content: object) -> str:
    """The text of a message's content, of a message, or of messages. Pictures and sounds are a mark of their own.

    >>> text_of([{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}])
    '2 + 3?'
    """
    if isinstance(content, list):
        return "\n".join(filter(None, map(text_of, content)))
    if isinstance(content, Mapping) and re.search("image|audio|video", str(content.get("type"))):
        return f"[{content['type']} {zlib.crc32(json.dumps(content, sort_keys=True, default=str).encode()):08x}]"
    if isinstance(content, Mapping):
        values = (content.get(name) for name in ("content", "text", "output", "value"))  # the last one is ShareGPT's
        return text_of(next(filter(None, values), ""))
    return "" if content is None else str(content)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Half a line at the end, of a writer that was killed, is left out."""
    if file.suffix == ".parquet":
        try:
            from pyarrow.parquet import read_table
        except ImportError as error:
            raise ValueError(f"{file}: parquet files are read with pyarrow: pip install pyarrow") from error
        yield from read_table(file).to_pylist()
        return
    if file.suffix == ".zst":
        content = _unpacked(file)
    else:
        content = file.read_bytes()
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                continue
            raise ValueError(f"{file}, line {number} is damaged: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number} is damaged: it holds a {type(row).__name__}, not an object")
        yield row


def _unpacked(file: Path) -> bytes:
    """All frames of a file: a writer that appends begins a new one each time. A small file may unpack to any size."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(file.read_bytes(), read_across_frames=True) as reader:
            content = reader.read(MOST_BYTES + 1)
    except zstandard.ZstdError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{file} would unpack to more than {MOST_BYTES / 2**20:,.0f} MiB; split it into several files")
    return content


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
        "problems": {"prompt", "answer"},
    }
    others = set(COMMON) & row.keys() - {"step", "prompt", "completion", "reward", "advantage"}
    if [*row][:3] == ["step", "prompt", "completion"] and [*row][-1] == "advantage" and not others:
        return "trl"  # which has a reward of the name `reward`
    return next((name for name, columns in marks.items() if columns <= row.keys()), ", ".join(row)[:80])


def _trace(file: str, row: int, form: str, fields: dict[str, Any]) -> Trace:
    """Makes the row of fields as a form has them: a text may be messages, and where a number should be, anything."""
    prompt, completion = fields.pop("prompt"), fields.pop("completion")
    trace = Trace(file, row, form, text_of(prompt), "", _messages(prompt), fields.pop("turns", _messages(completion)))
    answers = [turn for turn in trace.turns if turn.get("role") == "assistant"]
    trace.completion = text_of(answers if answers and not isinstance(completion, str) else completion)
    if isinstance(fields.get("advantage"), list):  # one for each token
        each = set(fields["advantage"])
        fields["advantage"] = each.pop() if len(each) == 1 else None
    trace.parts = {name: _number(trace, name, value) for name, value in fields.pop("parts", {}).items()}
    for name, value in fields.items():
        if name in ("reward", "advantage", "loss_denominator"):
            setattr(trace, name, _number(trace, name, value))
        elif name == "time":
            trace.time = _seconds(value)
        elif name in ("step", "sample", "version", "counted"):
            setattr(trace, name, _whole(value))
        elif name in ("group", "finish_reason"):
            setattr(trace, name, None if value is None else str(value))
        elif name == "error":
            trace.error = _error(value)
        elif value is not None:
            kind = LISTS_AND_TABLES.get(name)
            if kind and not isinstance(value, kind):
                raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
            setattr(trace, name, value)
    if trace.step is None and form in ("quartet", "verifiers_results"):  # whose files and folders are those of steps
        number = re.search(r"step_(\d+)[./]", file)
        trace.step = int(number[1]) if number else None
    return trace


def _number(trace: Trace, name: str, value: object) -> float | None:
    if value is None or isinstance(value, int | float):
        return None if value is None else float(value)
    trace.unread[name] = value
    return None


def _whole(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _seconds(value: object) -> float | None:
    """A time by the clock, which may be written as a date. None for anything else."""
    with suppress(TypeError, ValueError, OverflowError, OSError):
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        return value.timestamp() if isinstance(value, datetime) else float(value)  # type: ignore[arg-type]
    return None


def _error(value: object) -> str | None:
    """Says in one line what failed; None where nothing did."""
    if isinstance(value, Mapping):
        parts = [value.get("type") or value.get("kind") or value.get("error"), value.get("message")]
        return ": ".join(str(part) for part in parts if part) or None
    return str(value) if value else None


def _messages(value: object) -> list[Message]:
    """Messages without the keys that a table had to add."""
    if not isinstance(value, list):
        return []
    return [{key: entry for key, entry in message.items() if entry is not None} for message in value]


def _rest(row: Mapping[str, Any], *others: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in others}


def _trl(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The columns of numbers are its reward functions; a sum of them was not recorded. A column of another type was
    logged by one of them (`log_extra`)."""
    fixed = ("step", "prompt", "completion", "advantage")
    parts = {name: value for name, value in _rest(row, *fixed).items() if value is None or isinstance(value, float)}
    marks = [mark for mark in parts.values() if mark is not None and mark == mark]
    fields = {name: row[name] for name in fixed} | {"parts": parts, "reward": sum(marks) if marks else None}
    yield fields | {"columns": _rest(row, *fixed, *parts)}


def _verl(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    uid = row.get("uid")
    key = re.fullmatch(r"(.+)_(\d+)_\d+", str(uid))  # of a sample, its rollout and the output of it
    yield {
        "prompt": row["input"],
        "completion": row["output"],
        "reward": row["score"],
        "advantage": row.get("advantage", row.get("advantages")),
        "group": key[1] if key else uid,
        "sample": int(key[2]) if key else None,
        "columns": _rest(row, "input", "output", "score", "step", "advantage", "advantages"),
        **{name: row.get(name) for name in ("step", "finish_reason", "error")},
    }


def _verifiers(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An episode has the traces of one agent or several. Its nodes are messages, each with the tokens it added."""
    work = (row.get("run") or {}).get("work") or {}
    learning = [record for record in row["traces"] if (record.get("agent") or {}).get("trainable") is not False]
    for record in learning or row["traces"]:
        nodes, task = record.get("nodes") or [], record.get("task") or row["task"]
        calls = [_call(nodes, index) for index, node in enumerate(nodes) if node.get("sampled")]
        path = _path(nodes, len(nodes) - 1)
        first = next((place for place, node in enumerate(path) if node.get("sampled")), len(path))
        rewards = {name: value for name, value in (record.get("rewards") or {}).items() if value is not None}
        marks = [value["score"] * value.get("weight", 1.0) for value in rewards.values() if _is_number(value["score"])]
        credit = [value for node in nodes for value in node.get("advantages") or []]
        endings = [call.get("finish_reason") for call in record.get("calls") or [] if not call.get("error")]
        stop, timing = record.get("stop_condition"), record.get("timing") or {}
        yield {
            "prompt": [node["message"] for node in path[:first]],
            "completion": [node["message"] for node in path[first:]],
            "group": (row.get("group") or {}).get("id") or task.get("key") or task.get("hash"),
            "step": work.get("step"),
            "version": (work.get("policy") or {}).get("start"),
            "split": "evaluation" if work.get("type") == "eval" else "train",
            "parts": {name: value["score"] for name, value in rewards.items()},
            "weights": {name: value.get("weight", 1.0) for name, value in rewards.items()},
            "reward": record.get("reward", sum(marks) if marks else None),
            "advantage": sum(credit) / len(credit) if credit else record.get("advantage"),
            "calls": calls,
            "token_ids": [token for call in calls for token in call.token_ids],
            "logprobs": [value for node in nodes for value in node.get("logprobs") or []],
            "finish_reason": stop if stop in CUT | FAILED else endings[-1] if endings else stop,
            "error": None
            if record.get("ok")
            else next(reversed(record.get("errors") or row.get("errors") or []), None),
            "time": timing.get("start"),
            "identity": record.get("id"),
            "at_limit": any(map(_at_limit, record.get("calls") or [])),
            "columns": dict(task.get("data") or {}) | (record.get("metrics") or {}) | {"timing": timing},
        }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _path(nodes: Sequence[Mapping[str, Any]], index: int | None) -> list[Mapping[str, Any]]:
    path: list[Mapping[str, Any]] = []
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


def _at_limit(call: Mapping[str, Any]) -> bool:
    used = (call.get("usage") or {}).get("completion_tokens") or 0
    return used >= ((call.get("sampling") or {}).get("max_tokens") or math.inf)


def _verifiers_results(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    metrics, timing, stop = row.get("metrics") or {}, row.get("timing") or {}, row.get("stop_condition")
    info = row["info"] if isinstance(row.get("info"), dict) else {}
    trained, calls, logprobs, credit = info.get("prime_rl") or {}, list[Call](), list[float](), None
    for step in row.get("trajectory") or []:
        credit = step.get("advantage")
        tokens = step.get("tokens") or {}
        texts = _messages(step.get("prompt")), _messages(step.get("completion"))
        calls.append(Call(tokens.get("prompt_ids") or [], tokens.get("completion_ids") or [], *texts))
        logprobs += tokens.get("completion_logprobs") or []
    yield {
        "prompt": row.get("prompt"),
        "group": row["example_id"],
        "parts": metrics,
        "finish_reason": "length" if row.get("is_truncated") else stop or ("stop" if row.get("is_completed") else None),
        "time": timing.get("start_time") or timing.get("start"),
        "calls": calls,
        "token_ids": [token for call in calls for token in call.token_ids],
        "logprobs": logprobs,
        "counted": (row.get("token_usage") or {}).get("output_tokens"),
        "version": row.get("policy_version", info.get("policy_version", trained.get("policy_version"))),
        "advantage": row.get("advantage", credit),
        "columns": _rest(row, "prompt", "completion", "reward", "trajectory", "metrics", *metrics),
        **{name: row.get(name) for name in ("completion", "reward", "step", "error")},
    }


def _nemo_gym(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    response, request = row["response"] or {}, row.get("responses_create_params") or {}
    question = request.get("input") or []
    turns, calls, logprobs, thought = list[Message](), list[Call](), list[float](), ""
    for item in response.get("output") or [{"type": "message", "content": response.get("output_text") or ""}]:
        if "generation_token_ids" in item:
            calls.append(Call(item.get("prompt_token_ids") or [], item["generation_token_ids"] or []))
            logprobs += item.get("generation_log_probs") or []
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought = text_of(item.get("summary") or item.get("content"))
            continue
        turn = {"role": "tool" if kind == "function_call_output" else item.get("role", "assistant")}
        turn |= {"content": text_of(item), "reasoning_content": thought if turn["role"] == "assistant" else ""}
        if kind == "function_call":
            turn["tool_calls"] = [{"name": item.get("name"), "arguments": item.get("arguments")}]
        turns.append({name: value for name, value in turn.items() if value or name == "content"})
        thought = "" if turn["role"] == "assistant" else thought
    versions = [
        item["weight_version"] for item in response.get("output") or [] if item.get("weight_version") is not None
    ]
    cut = response.get("incomplete_details") or response.get("status") == "incomplete"
    used = (response.get("usage") or {}).get("output_tokens") or 0
    yield {
        "prompt": [{"role": "user", "content": question}] if isinstance(question, str) else question,
        "completion": turns,
        "calls": calls,
        "token_ids": [token for call in calls for token in call.token_ids],
        "logprobs": logprobs,
        "group": row.get("_ng_task_index", row.get("task_index")),
        "sample": row.get("_ng_rollout_index"),
        "version": min(versions, default=row.get("policy_version")),
        "counted": used or None,
        "finish_reason": "length" if cut else response.get("finish_reason") or response.get("status"),
        "error": response.get("error") or row.get("error"),
        "time": response.get("created_at") or None,
        "identity": response.get("id"),
        "at_limit": used >= (request.get("max_output_tokens") or math.inf),
        "columns": _rest(row, "response", "responses_create_params", "reward", "advantage")
        | {"timing": {"response": {"start": response.get("created_at"), "end": response.get("completed_at")}}},
        **{name: row.get(name) for name in ("reward", "advantage", "step")},
    }


def _quartet(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    same = ("sample", "reward", "parts", "advantage", "finish_reason", "token_ids", "logprobs")
    yield {
        "prompt": row["prompt"],
        "messages": row.get("messages"),
        "completion": row["text"],
        "turns": row.get("turns") or [],
        "group": row["prompt_id"],
        "version": row.get("policy_version"),
        "error": (row.get("tools") or {}).get("failure"),
        "loss_mask": row.get("loss_mask"),
        "columns": {name: row.get(name) for name in ("prompt_id", "policy_logprobs")} | row["extras"],
        **{name: row.get(name) for name in same},
    }


COMMON = (
    "prompt", "completion", "reward", "advantage", "group", "sample", "step", "version", "finish_reason", "error",
    "prompt_ids", "token_ids", "logprobs", "loss_mask", "loss_denominator", "time", "split", "weights",
)  # fmt: skip


def _common(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Our own form for others: the names of `Trace`, of which `prompt`, `completion` and `reward` are needed."""
    parts, calls = row.get("rewards") or {}, [Call(**call) for call in row.get("calls") or []]
    fields = {"prompt": row["prompt"], "completion": row["completion"], "parts": parts, "calls": calls}
    yield {name: row.get(name) for name in COMMON} | fields | {"columns": _rest(row, *COMMON, "rewards", "calls")}


def _problems(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """No rollouts but the problems of an evaluation."""
    yield {"prompt": row["prompt"], "completion": "", "columns": row}


FORMS = {
    "problems": _problems,
    "trl": _trl,
    "verl": _verl,
    "verifiers": _verifiers,
    "verifiers_results": _verifiers_results,
    "nemo_gym": _nemo_gym,
    "quartet": _quartet,
    "common": _common,
}


def _leave_out_logged(traces: list[Trace]) -> None:
    """Takes the numbers that TRL's reward functions logged (`log_extra`) out of the parts.

    They stand after the rewards, and no advantage depends on them: rollouts of a group with equal rewards have equal
    advantages, whatever was logged. Columns that never differ between such rollouts stay."""
    if traces[0].form != "trl":
        return
    names = list(traces[0].parts)
    pairs: list[tuple[Trace, Trace]] = []
    for group in groups_of(traces):
        pairs += combinations(group[:LOOKED_AT], 2)
    for count in range(1, len(names)):
        pairs = [pair for pair in pairs if _have_equal_part(*pair, names[count - 1])]
        logged = set(names[count:])
        for name in names[count:]:
            if all(_have_equal_part(*pair, name) for pair in pairs):
                logged.remove(name)
        same = all(abs(one.credit - other.credit) < SAME_ADVANTAGE for one, other in pairs)
        if logged and same and len(pairs) >= FEW_PAIRS:
            for trace in traces:
                _move_to_columns(trace, logged)
            return


def _have_equal_part(one: Trace, other: Trace, name: str) -> bool:
    return one.parts.get(name) == other.parts.get(name)


def _move_to_columns(trace: Trace, names: set[str]) -> None:
    for name in names & trace.parts.keys():
        trace.columns[name] = trace.parts.pop(name)
    marks = [mark for mark in trace.parts.values() if mark is not None and mark == mark]
    trace.reward = sum(marks) if marks else None


def _without_repeats(traces: list[Trace]) -> list[Trace]:
    """TRL logs the completions of one generation at each of the steps that learn from it: the first of them stays.
    Where only a step here and there repeats the one before, it is no plan, and all stay."""
    stays: list[Trace] = []
    last: list[tuple[str, str, float | None]] = []
    steps = repeats = 0
    for _, group in groupby(traces, key=lambda trace: (trace.file, trace.step)):
        step = list(group)
        content = [(trace.prompt, trace.completion, trace.advantage) for trace in step]
        stays += [] if content == last else step
        steps, repeats, last = steps + 1, repeats + (content == last), content
    return stays if traces and traces[0].form == "trl" and repeats >= steps / 3 else traces
