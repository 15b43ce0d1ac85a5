"""Which policy a run folder stands for: the end of the run, else its newest checkpoint, else its warm start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from grpo.config.json_file import read_json
from grpo.config.mtp import MtpConfig
from grpo.config.options import load
from grpo.config.run import ModelOptions, TrainConfig
from grpo.config.yaml_file import read_yaml
from grpo.loader import load_policy
from grpo.run import checkpoint
from grpo.run.checkpoint import Checkpoint
from grpo.run.resume import base_changed
from policies import presets
from policies.files.atomic import write_file
from policies.files.digests import write_digests
from policies.policy import Policy, PolicyError

# In policy/ and best_policy/ of a run: {"step": 160, "checkpoint": SHA-256 of the manifest of that step's checkpoint}
RECORD = "training.json"
PARTS = ("policy", "draft")  # of a checkpoint: those that sample


@dataclass(frozen=True)
class PolicySource:
    """`folder` holds the policy; `meaning` says in words what it is; `step` is the run's, where it is known.

    A checkpoint is read when it is found: its run may remove it soon after.

    >>> find_policy("runs/demo")
    PolicySource(folder='runs/demo/policy', meaning='the end of the run', checkpoint=None, step=160)
    """

    folder: str
    meaning: str
    checkpoint: Path | None = None
    step: int | None = None
    saved: Checkpoint | None = field(default=None, compare=False, repr=False)


def save_policy(policy: Policy, folder: Path, step: int) -> None:
    """Write a run's policy, then the step that it is of, and by its digest the checkpoint that holds the same weights.

    A copy of the run says the same: no file time is looked at.
    """
    policy.save(folder)
    path = checkpoint.saved(folder.parent / "checkpoints").get(step)
    write_file(folder / RECORD, json.dumps({"step": step, "checkpoint": _digest(path) if path else None}) + "\n")
    write_digests(folder)


def find_policy(model: str) -> PolicySource:
    """What `model` (a preset, a folder, a hub id, a run, or a checkpoint inside a run) means.

    Raises PolicyError for a run that has saved nothing yet, CheckpointError for a checkpoint that is damaged.
    """
    folder = Path(model)
    if (folder / checkpoint.MANIFEST).is_file():
        meaning = f"a checkpoint of {folder.parent.parent}"
        return PolicySource(model, meaning, folder, _step_of(folder), checkpoint.load(folder, PARTS))
    if not (folder / "environment.json").is_file():
        return PolicySource(model, "as given", step=_record(folder).get("step"))
    if (folder / "policy").is_dir():
        meaning, newest = "the end of the run", checkpoint.newest(folder / "checkpoints")
        if newest and _went_on(folder, newest):
            meaning = f"where the run ended first; it went on, to evaluate that name {newest}"
        return PolicySource(str(folder / "policy"), meaning, step=_record(folder / "policy").get("step"))
    if found := _newest(folder / "checkpoints"):
        path, saved = found
        return PolicySource(str(path), "the newest checkpoint; the run has not ended", path, _step_of(path), saved)
    if (folder / "warm_start").is_dir():
        return PolicySource(str(folder / "warm_start"), "the warm start; no step of GRPO is saved yet")
    raise PolicyError(f"model={model!r} is a run that has not saved a policy yet; go on with it: --resume auto")


def _went_on(run: Path, newest: Path) -> bool:
    """Whether `newest` is not the checkpoint that `policy/` was saved with, be it of a later or of an earlier step.

    A run of an older version has no record in `policy/`. It ended where its configuration says, or it has not ended.
    """
    record = _record(run / "policy")
    if record.get("checkpoint"):
        return record["checkpoint"] != _digest(newest)
    end = record.get("step") or _last_step(run / "config.yaml")
    return end is not None and end != _step_of(newest)


def _last_step(config: Path) -> int | None:
    options = read_yaml(config)[0] if config.is_file() else {}
    return options.get("steps") or options.get("warm_start", {}).get("steps")


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return read_json(path) if path.is_file() else {}


def _digest(checkpoint_folder: Path) -> str:
    return hashlib.sha256((checkpoint_folder / checkpoint.MANIFEST).read_bytes()).hexdigest()


def _step_of(checkpoint_folder: Path) -> int | None:
    step = checkpoint_folder.name.removeprefix("step_")
    return int(step) if step.isdecimal() else None  # a copy may have another name


def load_found(source: PolicySource, options: ModelOptions) -> Policy:
    """The policy of `source` on its device. Raises PolicyError or CheckpointError for what cannot be loaded."""
    if source.checkpoint is None or source.saved is None:
        return load_policy(options.model_copy(update={"model": source.folder}))
    run = source.checkpoint.parent.parent
    file = run / "config.yaml"
    config = load(MtpConfig if "head" in read_yaml(file)[0] else TrainConfig, file, {})
    base = str(run / "warm_start") if (run / "warm_start").is_dir() else config.model
    if base in presets.PRESETS:
        raise PolicyError(
            f"{source.checkpoint} continues the preset {base!r}, whose tokenizer is saved at the end of the run only; "
            "let the run end: --resume auto"
        )
    update = {"model": base, "add_mtp": config.add_mtp, "seed": config.seed}
    policy = load_policy(options.model_copy(update=update))
    tensors = source.saved.tensors
    if isinstance(config, TrainConfig):
        if config.lora:
            policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
            same_precision = options.dtype == config.dtype  # in another one every weight has other bits
            if same_precision and (changed := base_changed(policy, source.saved, f"model={base!r}")):
                raise PolicyError(changed)
    else:
        policy.draft_ids = tensors["draft"]["ids"].to(policy.device) if "draft" in tensors else None
    _copy(tensors["policy"], policy, source.checkpoint)
    return policy


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], policy: Policy, where: Path) -> None:
    own = dict(policy.named_parameters()) | dict(policy.named_buffers())
    if wrong := [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]:
        raise PolicyError(f"{where} holds tensors that its run's model does not have: {wrong[:5]}")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _newest(root: Path) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint, read. One that its run removes meanwhile gives way to a newer one."""
    while newest := checkpoint.newest(root):
        try:
            return newest, checkpoint.load(newest, PARTS)
        except (checkpoint.CheckpointError, OSError, SafetensorError):
            if newest.is_dir():
                raise
    return None
