"""Which policy a run folder stands for: the end of the run, else its newest checkpoint, else its warm start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo import checkpoint
from grpo.config import ModelOptions, TrainConfig
from grpo.loader import load_policy
from grpo.mtp_config import MtpConfig
from grpo.options import load
from grpo.yaml_file import read_yaml
from policies import presets
from policies.policy import Policy, PolicyError


@dataclass(frozen=True)
class PolicySource:
    """`folder` holds the policy; `meaning` says in words what it is.

    >>> find_policy("runs/demo")
    PolicySource(folder='runs/demo/policy', meaning='the end of the run', checkpoint=None)
    """

    folder: str
    meaning: str
    checkpoint: Path | None = None


def find_policy(model: str) -> PolicySource:
    """What `model` (a preset, a folder, a hub id, a run, or a checkpoint inside a run) means.

    Raises PolicyError for a run that has saved nothing yet.
    """
    folder = Path(model)
    if (folder / checkpoint.MANIFEST).is_file():
        return PolicySource(model, f"a checkpoint of {folder.parent.parent}", folder)
    if not (folder / "environment.json").is_file():
        return PolicySource(model, "as given")
    newest = checkpoint.find(folder / "checkpoints", "auto")
    if (folder / "policy").is_dir():
        meaning = "the end of the run"
        if newest and _saved_at(newest / checkpoint.MANIFEST) > _saved_at(folder / "policy" / "config.json"):
            meaning = f"where the run ended first; it went on, to evaluate that name {newest}"
        return PolicySource(str(folder / "policy"), meaning)
    if newest:
        return PolicySource(str(newest), "the newest checkpoint; the run has not ended", newest)
    if (folder / "warm_start").is_dir():
        return PolicySource(str(folder / "warm_start"), "the warm start; no step of GRPO is saved yet")
    raise PolicyError(f"model={model!r} is a run that has not saved a policy yet; go on with it: --resume auto")


def load_found(source: PolicySource, options: ModelOptions) -> Policy:
    """The policy of `source` on its device. Raises PolicyError or CheckpointError for what cannot be loaded."""
    if source.checkpoint is None:
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
    tensors = checkpoint.load(source.checkpoint).tensors
    if isinstance(config, TrainConfig):
        if config.lora:
            policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
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


def _saved_at(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0
