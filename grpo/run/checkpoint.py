"""Checkpoints that are complete or invisible: written aside, fsynced, hashed, renamed.

    checkpoints/step_000010/policy.safetensors   one file for each mapping of tensors
                            state.json           {"step": 10, "state": {...}}
                            manifest.json        {"files": {"state.json": {"bytes": .., "sha256": ".."}, ..}}

Hidden siblings are left by a save that was killed, and removed by the next: `.step_000010.partial` was being
written, `.removed` deleted, and `.replaced` is the former checkpoint of a step that was saved again (put back
if the new one never arrived).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from grpo.config.json_file import read_json
from policies.files.atomic import fsync as _fsync
from policies.files.atomic import heed_umask
from policies.files.digests import digests, fault
from policies.sharding import whole

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
DTYPES = {  # as safetensors names them
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
MANIFEST, STATE = "manifest.json", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or trusted. The message names the file and the way out."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]  # read from the files when they are asked for
    state: dict[str, Any]
    path: Path


def save(
    root: Path,
    step: int,
    tensors: Tensors,
    state: dict[str, Any],
    *,
    keep: int | None = None,
    protect: Collection[int] = (),
) -> Path:
    """Write `root/step_<step>` and return it; killed or failed, it leaves earlier checkpoints as they were.

    Then older checkpoints are removed: `keep` remain, this one included, besides the steps in `protect`.
    Those of later steps are left alone. A step that exists already is replaced.
    Raises CheckpointError: `state` holds a value that JSON would change, or the disk refuses a write.

    >>> save(Path("runs/a/checkpoints"), 10, {"policy": model.state_dict()}, {"prompts_seen": 80}, keep=3)
    PosixPath('runs/a/checkpoints/step_000010')
    """
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep={keep} would keep no checkpoint; use 1 or more, or None to keep all")
    _refuse_non_json(state, "state")
    document = json.dumps({"step": step, "state": state}, indent=1, allow_nan=False)
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step_{step:06d}"
    partial, replaced = (root / f".{target.name}.{suffix}" for suffix in ("partial", "replaced"))
    try:
        _recover(root)
        for leftover in root.glob(".step_*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        _write(partial, tensors, document)
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        _fsync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        _recover(root)
        raise CheckpointError(_why_not_written(target, tensors, document, error)) from error
    shutil.rmtree(replaced, ignore_errors=True)
    older = [path for other, path in saved(root).items() if other < step and other not in protect]
    for path in older[: max(0, len(older) - keep + 1)] if keep else []:
        _remove(path)
    return target


def load(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Read a checkpoint whose sizes and hashes are right; else raise CheckpointError, naming the file.

    `only` names the mappings of tensors that are wanted, None is all of them.
    """
    if fault := _fault(path):
        before = takewhile(lambda other: other != path, saved(path.parent).values())
        earlier = [other for other in before if not _fault(other)]
        way_out = f"resume from {earlier[-1]}" if earlier else "none before it is intact: start a new run"
        raise CheckpointError(f"checkpoint {path} is damaged: {fault}; {way_out}")
    files = [file for file in sorted(path.glob("*.safetensors")) if only is None or file.stem in only]
    try:
        document = read_json(path / STATE)
        step, state = document["step"], document["state"]
        if type(step) is not int or not isinstance(state, dict):
            raise ValueError(f"{STATE} holds no step and state")
        tensors = {file.stem: load_file(file) for file in files}
    except (ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged, though its sums are right: {error!r}") from error
    return Checkpoint(step, tensors, state, path)


def find(root: Path, which: str) -> Path | None:
    """The checkpoint to resume from. "auto": the newest, None if there is none. Otherwise: the path itself.

    "auto" skips no damaged checkpoint: `load` refuses it and names the one before.
    """
    _recover(root)
    found = list(saved(root).values())
    if which == "auto":
        return found[-1] if found else None
    if (Path(which) / MANIFEST).is_file():
        return Path(which)
    listing = ", ".join(map(str, found)) or f"none in {root}"
    raise CheckpointError(f"{which} is no checkpoint (no {MANIFEST} in it); use auto, or one of: {listing}")


def discard_after(root: Path, step: int) -> list[Path]:
    """Remove the checkpoints later than `step`, which a run that resumed from there has left."""
    stale = [path for other, path in saved(root).items() if other > step]
    for path in stale:
        _remove(path)
    return stale


def newest(root: Path) -> Path | None:
    """For readers beside a living run: nothing is repaired. None if there is no checkpoint."""
    return next(reversed(saved(root).values()), None)


def saved(root: Path) -> dict[int, Path]:
    """The checkpoints in `root` by step, ascending."""
    found = ((int(path.name[5:]), path) for path in root.glob("step_*") if path.name[5:].isdecimal())
    return dict(sorted(found))


def _write(folder: Path, tensors: Tensors, document: str) -> None:
    for name, mapping in tensors.items():
        save_file(mapping, folder / f"{name}.safetensors")
    heed_umask(folder)
    (folder / STATE).write_text(document)
    (folder / MANIFEST).write_text(digests(folder))
    for path in [*folder.iterdir(), folder]:
        _fsync(path)


def save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """As safetensors, one tensor after the other: those of a sharded learner are never whole all at once."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_file(path: Path) -> Mapping[str, torch.Tensor]:
    return _Stored(path)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    return fault(path, MANIFEST, needed=[STATE])


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.removed")  # renamed first: half a checkpoint must never be visible
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _recover(root: Path) -> None:
    for former in root.glob(".step_*.replaced"):
        target = root / former.name.removeprefix(".").removesuffix(".replaced")
        if not target.exists():
            os.replace(former, target)


def _why_not_written(target: Path, tensors: Tensors, document: str, error: Exception) -> str:
    message = f"cannot write checkpoint {target}: {error}"
    if getattr(error, "errno", 0) != errno.ENOSPC and "os error 28" not in str(error):
        return message
    needed = len(document) + sum(tensor.nbytes for mapping in tensors.values() for tensor in mapping.values())
    way_out = "make room, keep fewer checkpoints or use another disk, then resume; earlier ones are intact"
    return f"{message}; needs {needed} bytes, {shutil.disk_usage(target.parent).free} are free: {way_out}"


def _refuse_non_json(value: Any, key: str) -> None:
    """Refuse what JSON would change or not take: a tuple, a key that is no string, NaN, any other type."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        for name, entry in value.items():
            _refuse_non_json(entry, f"{key}.{name}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _refuse_non_json(entry, f"{key}[{index}]")
    elif not isinstance(value, int | str | float | None) or (type(value) is float and not isfinite(value)):
        ways = "None, bool, int, finite float, str, list, dict with string keys; tensors go into `tensors`"
        raise CheckpointError(f"{key} is {value!r:.60} ({type(value).__name__}): JSON takes only {ways}")
