"""From `model:` in a config to a policy on its device."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch

from grpo.agreement import check_agreement
from grpo.config.run import ModelOptions, MTPOptions
from grpo.run.threads import threads_for
from policies import presets
from policies.files import hub
from policies.files.digests import check_policy
from policies.policy import Policy, PolicyError, read_config, read_tokenizer
from rollout.sampling import SamplingParams


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}: there is no CUDA device here; use cpu or auto")
    return torch.device(name)


def check_model(model: str) -> None:
    """Refuse early what can only be a mistake: a path that is not there, a misspelt preset."""
    if model in presets.PRESETS or Path(model).is_dir():
        return
    looks_local = model.startswith(("/", ".", "~")) or model.count("/") != 1 or Path(model.split("/")[0]).exists()
    if looks_local:
        near = difflib.get_close_matches(model, presets.PRESETS, n=1)
        hint = f"did you mean the preset {near[0]!r}?" if near else f"presets are {', '.join(presets.PRESETS)}"
        if (Path.cwd() / model).parent.is_dir() and "/" in model:
            hint += "; `make smollm2` prepares models/smollm2-135m-mla" if "smollm2" in model else ""
        if re.fullmatch(r"[\w.-]+", model) and not model.startswith("."):
            hint += f"; if a hub id was meant, write its owner too: OWNER/{model}"
        raise PolicyError(f"model={model!r}: there is no such folder; {hint}")
    if why := hub.why_absent(model):
        raise PolicyError(f"model={model!r} is neither a preset, a checkpoint folder nor a reachable hub id: {why}")


def check_options(options: ModelOptions) -> str:
    """The checkpoint or preset that `options` mean. Raises PolicyError for what it can be seen not to be or to do."""
    model = policy_folder(options.model)
    check_model(model)
    if asked := _head_options(options):
        kind = "deepseek_v3" if model in presets.PRESETS else read_config(model).model_type
        if kind != "deepseek_v3":
            raise PolicyError(
                f"{', '.join(asked)}: model={model!r} is of type {kind!r}, which has no MTP head and can be given "
                "none; leave that out, or make it a DeepSeek-V3 policy first (`quartet convert SRC DST`)"
            )
    template = getattr(getattr(options, "data", None), "template", getattr(options, "template", None))
    if template == "chat" and (model in presets.PRESETS or not read_tokenizer(model).chat_template):
        raise PolicyError(
            f"template=chat: model={model!r} has no chat template; use a format string such as '{{question}}\\n'"
        )
    return model


def _head_options(options: ModelOptions) -> list[str]:
    """What `options` ask of an MTP head, as key=value."""
    rollout, mtp = getattr(options, "rollout", None), getattr(options, "mtp", MTPOptions())
    drafts = getattr(rollout or options, "draft_tokens", None)
    asked = [f"{'rollout.' if rollout else ''}draft_tokens={drafts}"] if drafts else []
    asked += ["add_mtp=True"] if options.add_mtp else []
    usual = dict(MTPOptions())
    trained = [f"mtp.{name}={value}" for name, value in mtp if value != usual[name]]
    return asked + (trained if mtp.loss_weight else [])


def policy_folder(model: str) -> str:
    """A run folder stands for the policy it trained: `policy/` when the run ended, else its warm start."""
    if not (Path(model) / "environment.json").exists():
        return model
    for name in ("policy", "warm_start"):
        if (Path(model) / name).is_dir():
            return str(Path(model) / name)
    raise PolicyError(f"model={model!r} is a run that has not saved a policy yet; go on with it: --resume auto")


def known_context(model: str) -> int | None:
    """The longest text in tokens, of a preset or a folder; None of a hub id, whose config may have to be fetched."""
    model = policy_folder(model)
    if model in presets.PRESETS:
        return int(presets.PRESETS[model]["max_position_embeddings"])
    if not Path(model).is_dir():
        return None
    return getattr(read_config(model), "max_position_embeddings", None)


class SamplingOptions(Protocol):
    temperature: float
    max_completion_tokens: int
    draft_tokens: int | None
    accept: Literal["exact", "margin"]


def sampling_params(policy: Policy, options: SamplingOptions, group_size: int, seed: int) -> SamplingParams:
    """How `policy` samples under these options: its own stop tokens, drafts where it has a head for them."""
    return SamplingParams(
        group_size=group_size,
        temperature=options.temperature,
        max_completion_tokens=options.max_completion_tokens,
        stop_token_ids=tuple(policy.stop_token_ids),
        seed=seed,
        draft_tokens=options.draft_tokens if policy.mtp is not None else options.draft_tokens or 0,
        accept=options.accept,
    )


def load_policy(options: ModelOptions, corpus: Iterable[str] = ()) -> Policy:
    """A preset with fresh weights and a tokenizer learned from `corpus`, or a checkpoint."""
    model = check_options(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    if model in presets.PRESETS:
        policy = presets.build(model, corpus, options.seed).cast(dtype)
    else:
        check_policy(Path(model))
        policy = Policy.load(model, dtype, add_mtp=options.add_mtp, seed=options.seed)
    if not options.threads:
        torch.set_num_threads(threads_for(sum(parameter.numel() for parameter in policy.trunk.parameters())))
    policy = policy.to(device_of(options.device))
    if policy.backend == "transformers":
        check_agreement(policy)
    return policy
