"""Curves that other trainers have written, without rollouts: by content one of the forms here, by our names of metrics.

    form                    written by                                   a step is
    trainer_state.json      transformers.Trainer, in every checkpoint    an entry of log_history
    TensorBoard events      torch's SummaryWriter, for any trainer       records of one step
    W&B history             wandb's export: JSON, JSON lines or CSV      a row with _step or Step
    verl's file logger      trainer.logger=['file']                      a line {"step": 1, "data": {...}}

TensorBoard's files are read without TensorBoard: records of length, checksum and a protobuf message, of which scalars
are taken.
"""

from __future__ import annotations

import csv
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRL = {
    "loss": "loss/total",
    "grad_norm": "learner/grad_norm",
    "learning_rate": "learner/learning_rate",
    "kl": "loss/kl",
    "entropy": "policy/entropy",
    "clip_ratio/region_mean": "policy/clip_fraction",
    "clip_ratio/low_mean": "policy/clip_fraction_low",
    "clip_ratio/high_mean": "policy/clip_fraction_high",
    "sampling/sampling_logp_difference/mean": "mismatch/logprob_abs_mean",
    "sampling/sampling_logp_difference/max": "mismatch/logprob_abs_max",
    "sampling/importance_sampling_ratio/mean": "mismatch/weight_mean",
    "step_time": "time/step",
    "eval_reward": "eval/reward_mean",
    "eval_completions/mean_length": "eval/completion_length_mean",
    "eval_completions/clipped_ratio": "eval/completion_truncated",
}
OF_COMPLETIONS = {  # what TRL says of the completions, and a run folder counts itself
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "group/zero_variance",
    "completions/mean_length": "completion/length_mean",
    "completions/max_length": "completion/length_max",
    "completions/clipped_ratio": "completion/truncated",
}
VERL = {
    "critic/score/mean": "reward/mean",
    "critic/rewards/mean": "reward/mean",
    "response_length/mean": "completion/length_mean",
    "response_length/max": "completion/length_max",
    "response_length/clip_ratio": "completion/truncated",
    "actor/pg_loss": "loss/policy",
    "actor/loss": "loss/total",
    "actor/kl_loss": "loss/kl",
    "actor/entropy": "policy/entropy",
    "actor/entropy_loss": "policy/entropy",
    "actor/ppo_kl": "policy/approx_kl",
    "actor/pg_clipfrac": "policy/clip_fraction",
    "actor/grad_norm": "learner/grad_norm",
    "actor/lr": "learner/learning_rate",
    "perf/time_per_step": "time/step",
}
NAMES = TRL | OF_COMPLETIONS | VERL
TEXTS = {"prompt", "completion", "input", "output", "text", "traces", "messages"}  # columns of rollouts
STEPS = ("_step", "step", "Step", "global_step", "train/global_step", "trainer/global_step")
PART = re.compile(r"rewards/(?P<name>.+)/mean")
VALIDATION = re.compile(r"val-core/.+/(?:mean|acc|best)@\d+(?:/mean)?")
RECORD = struct.Struct("<QI")  # length of a record, and the checksum of the length
MOST_RECORD = 2**24  # bytes of a record; longer ones are pictures or damage


@dataclass
class Log:
    """Curves by our names: one row a step, steps ascending. `others` are names that have no counterpart here."""

    path: Path
    form: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int | None = None  # that the run has been given
    others: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """The names of reward functions."""
        prefix = "reward/part/"
        return sorted({name.removeprefix(prefix) for row in self.rows for name in row if name.startswith(prefix)})


def read_log(path: Path) -> Log | None:
    """The curves in a file or folder; None for what is none of the forms above.

    >>> read_log(Path("checkpoint-20/trainer_state.json")).rows[0]
    {'step': 1, 'loss/total': 0.01, 'reward/mean': 0.4, ...}
    """
    if path.is_dir():
        return _of_folder(path)
    if ".tfevents." in path.name or _is_events(path):
        return _log(path, "TensorBoard events", _events(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return None
    return _of_json(path, text) or _of_lines(path, text) or _of_csv(path, text)


def _of_folder(path: Path) -> Log | None:
    """The last trainer_state.json, or all event files together."""
    states = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name.split("-")[-1]))
    for file in [path / "trainer_state.json", *reversed(states)]:
        if file.is_file():
            return read_log(file)
    files = sorted(path.rglob("*.tfevents.*"))
    rows = [row for file in files for row in _events(file)]
    return _log(path, "TensorBoard events", rows) if rows else None


def _of_json(path: Path, text: str) -> Log | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(content, dict) and isinstance(content.get("log_history"), list):
        log = _log(path, "trainer_state.json", content["log_history"])
        if log:
            log.steps = content.get("max_steps")
        return log
    if isinstance(content, dict) and isinstance(content.get("history"), list):
        content = content["history"]
    return _log(path, "W&B history", content) if isinstance(content, list) else None


def _of_lines(path: Path, text: str) -> Log | None:
    """verl's file logger or a W&B history in JSON lines. Half a line at the end is left out."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            return None
        rows.append(row)
    if rows and all(isinstance(row.get("data"), dict) and "step" in row for row in rows):
        return _log(path, "verl's file logger", [{"step": row["step"], **row["data"]} for row in rows])
    return _log(path, "W&B history", rows)


def _of_csv(path: Path, text: str) -> Log | None:
    """A table from W&B's page names its columns "run - metric"; an exported history has the metrics alone."""
    rows = []
    for row in csv.DictReader(text.splitlines()):
        named: dict[str, Any] = {}
        for column, value in row.items():
            metric = str(column).rpartition(" - ")[2]
            if not metric.endswith(("__MIN", "__MAX")):
                named[metric] = _number(value)
        rows.append(named)
    return _log(path, "W&B history", rows)


def _log(path: Path, form: str, rows: Sequence[Any]) -> Log | None:
    """None for rollouts, and if there is no step or no metric that is known here."""
    if any(not isinstance(row, dict) or TEXTS & row.keys() for row in rows):
        return None
    steps: dict[int, dict[str, Any]] = {}
    others: set[str] = set()
    for row in rows:
        step = next((_number(row[name]) for name in STEPS if name in row), None)
        if step is None or not 0 <= step < 1e9:
            continue
        line = steps.setdefault(int(step), {"step": int(step)})
        for name, value in row.items():
            ours, number = _name(str(name)), _number(value)
            if ours and number is not None:
                line[ours] = number
            elif number is not None and name not in STEPS:
                others.add(str(name))
    read = [steps[step] for step in sorted(steps)]
    known = {name for row in read for name in row} - {"step"}
    return Log(path, form, read, None, sorted(others)) if known else None


def _name(theirs: str) -> str | None:
    """Our name of a metric.

    >>> _name("train/rewards/accuracy/mean"), _name("actor/lr"), _name("epoch")
    ('reward/part/accuracy', 'learner/learning_rate', None)
    """
    name = theirs.removeprefix("train/")
    if name.startswith("eval/") and f"eval_{name[5:]}" in NAMES:
        name = f"eval_{name[5:]}"
    if VALIDATION.fullmatch(name):
        return "eval/reward_mean"
    part = PART.fullmatch(name)
    return f"reward/part/{part['name']}" if part else NAMES.get(name)


def _number(value: Any) -> float | None:
    """The finite number, or None."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# ---- TensorBoard's files ---------------------------------------------------------------------------------------------


def _is_events(path: Path) -> bool:
    """Whether a file begins with a record whose message tells its version."""
    try:
        head = path.open("rb").read(64)
    except OSError:
        return False
    return b"brain.Event:" in head


def _events(path: Path) -> list[dict[str, Any]]:
    """One row for each record with scalars. What is cut at the end is left out."""
    content, place = path.read_bytes(), 0
    rows: list[dict[str, Any]] = []
    while place + RECORD.size <= len(content):
        length, _ = RECORD.unpack_from(content, place)
        start = place + RECORD.size
        place = start + length + 4
        if length > MOST_RECORD or place > len(content):
            break
        rows += _scalars(content[start : start + length])
    return rows


def _scalars(event: bytes) -> Iterator[dict[str, Any]]:
    """Event: step is field 2, summary 5. Summary.Value: tag 1, simple_value 2, tensor 8."""
    step, values = 0, dict[str, float]()
    for number, content in _fields(event):
        if number == 2 and isinstance(content, int):
            step = content
        for _, value in _fields(content) if number == 5 and isinstance(content, bytes) else ():
            named = dict(_fields(value)) if isinstance(value, bytes) else {}
            scalar = _float(named.get(2)) if 2 in named else _of_tensor(named.get(8))
            tag = named.get(1)
            if scalar is not None and isinstance(tag, bytes):
                values[tag.decode(errors="replace")] = scalar
    if values:
        yield {"step": step, **values}


def _of_tensor(tensor: Any) -> float | None:
    """A scalar TensorProto of float32: dtype 1, tensor_content 4, float_val 5."""
    named = dict(_fields(tensor)) if isinstance(tensor, bytes) else {}
    return _float(named.get(5) or named.get(4)) if named.get(1) == 1 else None


def _float(content: Any) -> float | None:
    if not isinstance(content, bytes) or len(content) != 4:
        return None
    return float(struct.unpack("<f", content)[0])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: a number, or its bytes. Raises nothing: what is damaged ends it."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind, number = key & 7, key >> 3
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, place = _varint(message, place)
        if size is None:
            return
        yield number, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message):
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            break
    return value, place


def lacking(log: Log, needed: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What of `needed` metrics the log does not have, with the kinds of findings that need them."""
    known = {name for row in log.rows for name in row}
    return {name: list(kinds) for name, kinds in needed.items() if name not in known}
