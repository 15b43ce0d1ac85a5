"""Checkpoints that are complete or invisible: written aside, fsynced, hashed, renamed.

    checkpoints/step_000010/policy.safetensors   one file for each mapping of tensors, or as many as there are ranks
                            state.json           {"step": 10, "state": {...}}
                            manifest.json        {"files": {"state.json": {"bytes": .., "sha256": ".."}, ..}}

All ranks write into one folder, each files of its own (`policies.tensor_files`), so all machines must see it. The files
do not say how many ranks there were: any number reads them.

Hidden siblings are left by a save that was killed, and removed by the next: `.step_000010.partial` was being
written, `.removed` deleted, and `.replaced` is the former checkpoint of a step that was saved again (put back
if the new one never arrived).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from policies import tensor_files
from policies.files.atomic import fsync, write_file
from policies.files.digests import fault, listing, size_and_hash
from policies.sharding import everyone, leads, place
from policies.tensor_files import Tensors
from rewards.config.json_file import read_json

MANIFEST, STATE = "manifest.json", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or trusted. The message names the file and the way out."""

    everywhere = False  # every rank has raised it


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

    Every rank calls it; `state`, `keep` and `protect` are those of rank 0. Then older checkpoints are removed: `keep`
    remain, this one included, besides the steps in `protect`. Those of later steps are left alone. A step that exists
    already is replaced.
    Raises CheckpointError: `state` holds a value that JSON would change, or the disk refuses a write. All ranks raise
    it where it refuses one of theirs.

    >>> save(Path("runs/a/checkpoints"), 10, {"policy": model.state_dict()}, {"prompts_seen": 80}, keep=3)
    PosixPath('runs/a/checkpoints/step_000010')
    """
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep={keep} would keep no checkpoint; use 1 or more, or None to keep all")
    _refuse_non_json(state, "state")
    document = json.dumps({"step": step, "state": state}, indent=1, allow_nan=False)
    target = root / f"step_{step:06d}"
    partial, replaced = (root / f".{target.name}.{suffix}" for suffix in ("partial", "replaced"))

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _recover(root)
        for leftover in root.glob(".step_*"):
            shutil.rmtree(leftover)
        partial.mkdir()

    def write() -> dict[str, dict[str, Any]]:
        return {path.name: size_and_hash(path) for path in tensor_files.write(tensors, partial)}

    def finish() -> None:
        write_file(partial / STATE, document)
        files = {name: entry for part in written for name, entry in part.items()}
        write_file(partial / MANIFEST, listing(files | {STATE: size_and_hash(partial / STATE)}))
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        fsync(root)

    try:
        _together(target, tensors, begin if leads() else None)
        written = _together(target, tensors, write)
        _together(target, tensors, finish if leads() else None)
    except CheckpointError:
        if leads():
            shutil.rmtree(partial, ignore_errors=True)
            _recover(root)
        raise
    if leads():
        shutil.rmtree(replaced, ignore_errors=True)
        older = [path for other, path in saved(root).items() if other < step and other not in protect]
        for path in older[: max(0, len(older) - keep + 1)] if keep else []:
            _remove(path)
    return target


def _together(target: Path, tensors: Tensors, act: Callable[[], Any] | None) -> list[Any]:
    """Gives what `act` returns on each rank. Where it fails on one, every rank raises the same CheckpointError."""
    done, refused = None, None
    try:
        done = act() if act else None
    except OSError as error:
        refused = error
    ended = everyone((done, _why_not_written(target, tensors, refused) if refused else ""))
    for rank, (_, why) in enumerate(ended):
        if why:
            who = f"rank {rank} of {len(ended)}: " if len(ended) > 1 else ""
            raise _everywhere(CheckpointError(f"cannot write checkpoint {target}: {who}{why}")) from refused
    return [done for done, _ in ended]


def load(path: Path, only: Collection[str] | None = None, *, together: bool = False) -> Checkpoint:
    """Read a checkpoint whose sizes and hashes are right; else raise CheckpointError, naming the file.

    `only` names the mappings of tensors that are wanted, None is all of them. With `together` every rank calls it, and
    each hashes a part of the files.
    """
    if fault := _fault(path, together):
        before = takewhile(lambda other: other != path, saved(path.parent).values())
        earlier = [other for other in before if not _fault(other, together)]
        way_out = f"resume from {earlier[-1]}" if earlier else "none before it is intact: start a new run"
        error = CheckpointError(f"checkpoint {path} is damaged: {fault}; {way_out}")
        raise _everywhere(error) if together else error
    try:
        document = read_json(path / STATE)
        step, state = document["step"], document["state"]
        if type(step) is not int or not isinstance(state, dict):
            raise ValueError(f"{STATE} holds no step and state")
        tensors = tensor_files.read(path, only)
    except (ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged, though its sums are right: {error!r}") from error
    return Checkpoint(step, tensors, state, path)


def find(root: Path, which: str) -> Path | None:
    """The checkpoint to resume from. "auto": the newest, None if there is none. Otherwise: the path itself.

    "auto" skips no damaged checkpoint: `load` refuses it and names the one before.
    """
    _recover(root)
    checkpoints = list(saved(root).values())
    if which == "auto":
        return checkpoints[-1] if checkpoints else None
    if (Path(which) / MANIFEST).is_file():
        return Path(which)
    listing = ", ".join(map(str, checkpoints)) or f"none in {root}"
    raise CheckpointError(f"{which} is no checkpoint (no {MANIFEST} in it); use auto, or one of: {listing}")


def discard_after(root: Path, step: int) -> list[Path]:
    """Remove the checkpoints later than `step`, which a run that resumed from there has left."""
    stale = [path for other, path in saved(root).items() if other > step]
    for path in stale:
        _remove(path)
    return stale


def newest(root: Path) -> Path | None:
    """Finds the newest checkpoint for readers beside a living run: nothing is repaired. None if there is none."""
    return next(reversed(saved(root).values()), None)


def saved(root: Path) -> dict[int, Path]:
    """The checkpoints in `root` by step, ascending."""
    steps = ((int(path.name[5:]), path) for path in root.glob("step_*") if path.name[5:].isdecimal())
    return dict(sorted(steps))


def _fault(path: Path, together: bool = False) -> str | None:
    """Tells what is wrong with a checkpoint, in words, or None."""
    if not together:
        return fault(path, MANIFEST, needed=[STATE])
    rank, ranks = place()
    faults = everyone(fault(path, MANIFEST, needed=[STATE], share=slice(rank, None, ranks)))
    return next(filter(None, faults), None)


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.removed")  # renamed first: half a checkpoint must never be visible
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _recover(root: Path) -> None:
    for former in root.glob(".step_*.replaced"):
        target = root / former.name.removeprefix(".").removesuffix(".replaced")
        if not target.exists():
            os.replace(former, target)


def _why_not_written(target: Path, tensors: Tensors, error: OSError) -> str:
    way_out = "then resume; earlier ones are intact"
    if error.errno == errno.ENOENT and not leads():
        return f"{error}: output_dir must be a folder that the machines of all ranks see; choose another, {way_out}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error}: let this process write there, or use another disk, {way_out}"
    needed = sum(tensor.nbytes for mapping in tensors.values() for tensor in mapping.values())
    free = shutil.disk_usage(next(path for path in target.parents if path.exists())).free
    make_room = "make room, keep fewer checkpoints or use another disk"
    return f"{error}; needs {needed} bytes, {free} are free: {make_room}, {way_out}"


def _everywhere(error: CheckpointError) -> CheckpointError:
    error.everywhere = True
    return error


def _refuse_non_json(value: object, key: str) -> None:
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
