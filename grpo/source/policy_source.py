"""Which policy a preset, a folder, a run, a checkpoint or a hub id means, and how it is loaded.

Every command asks here. A run means the policy at its end, else its newest checkpoint, else its SFT stage.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DeepseekV3Config, PretrainedConfig
from transformers.distributed import DistributedConfig

from grpo.config.mtp import MtpConfig
from grpo.config.policy import ArchitectureOptions, ModelOptions
from grpo.config.run import LearningConfig, SftConfig, TrainConfig
from grpo.data.folders import run_of
from grpo.learner.parallel import ONE_PROCESS, Ranks
from grpo.run import checkpoint
from grpo.run.checkpoint import Checkpoint
from grpo.run.hardware import saved_threads, threads_for
from grpo.run.memory_errors import phase
from grpo.run.resume import base_changed
from policies import presets
from policies.attention import PROMPT_ATTENTION
from policies.checkpoint import check_policy
from policies.devices import device_of
from policies.files import gguf
from policies.files.atomic import write_file
from policies.files.checksums import write_checksums
from policies.layout import auto_class
from policies.mtp import MTPHead
from policies.policy import Policy, PolicyError, read_config
from policies.routing.heads import heads_config
from policies.sharding import leads
from rewards.config.json_file import read_json
from rewards.config.names import recorded_options
from rewards.config.options import load

Config = TypeVar("Config", bound=LearningConfig | MtpConfig)

# In policy/ and best_policy/ of a run: {"step": 160, "checkpoint": SHA-256 of the manifest of that step's checkpoint}
RECORD = "training.json"
PARTS = ("policy", "draft")  # of a checkpoint: those that sample


@dataclass(frozen=True)
class PolicySource:
    """`folder` holds the policy (or names a preset or a hub id); `meaning` says in words what it is.

    `base` is what its shape and tokenizer are read from: the same, or for a checkpoint what its run began with. `step`
    and `asked` are the run's, if it is known. A checkpoint is read when it is found: its run may remove it soon after.

    >>> find_policy("runs/demo")
    PolicySource(folder='runs/demo/policy', meaning='the end of the run', base='runs/demo/policy', step=60)
    """

    folder: str
    meaning: str
    base: str
    checkpoint: Path | None = None
    step: int | None = None
    saved: Checkpoint | None = field(default=None, compare=False, repr=False)
    asked: ModelOptions | None = field(default=None, compare=False, repr=False)  # the options of its run


def find_policy(model: str, *, read: bool = True) -> PolicySource:
    """Finds what `model` means; without `read` the tensors of a checkpoint are left where they are.

    Raises PolicyError for a path that is not there, a misspelt preset and a run that has saved nothing yet,
    CheckpointError for a checkpoint that is damaged, ValueError or OSError for the configuration of its run.
    """
    folder = Path(model)
    if (folder / checkpoint.MANIFEST).is_file():
        return _of_checkpoint(folder, f"a checkpoint of {run_of(folder)}", read)
    if not (folder / "environment.json").is_file():
        check_model(model)
        return PolicySource(model, "as given", model, step=_record(folder).get("step"))
    if (folder / "policy").is_dir():
        meaning, newest = "the end of the run", checkpoint.newest(folder / "checkpoints")
        if newest and _went_on(folder, newest):
            meaning = f"where the run ended first; it went on, to evaluate that name {newest}"
        policy = str(folder / "policy")
        return PolicySource(policy, meaning, policy, step=_record(folder / "policy").get("step"))
    while newest := checkpoint.newest(folder / "checkpoints"):
        try:
            return _of_checkpoint(newest, "the newest checkpoint; the run has not ended", read)
        except (checkpoint.CheckpointError, OSError, SafetensorError):
            if newest.is_dir():
                raise  # else its run has removed it, and there is a newer one
    if (folder / "warm_start").is_dir():
        policy = str(folder / "warm_start")
        return PolicySource(policy, "the SFT stage; no step of GRPO is saved yet", policy)
    raise PolicyError(f"model={model!r} is a run that has not saved a policy yet; go on with it: --resume auto")


def _of_checkpoint(folder: Path, meaning: str, read: bool) -> PolicySource:
    ran = _run_config(run := run_of(folder))
    base = str(run / "warm_start") if (run / "warm_start").is_dir() else find_policy(ran.model, read=False).folder
    saved = checkpoint.load(folder, PARTS) if read else None
    return PolicySource(str(folder), meaning, base, folder, _step_of(folder), saved, ran)


def _run_config(run: Path) -> TrainConfig | SftConfig | MtpConfig:
    file = run / "config.yaml"
    command, _ = recorded_options(file)
    kind: type[TrainConfig] | type[SftConfig] | type[MtpConfig] = {
        cls.command: cls for cls in (TrainConfig, SftConfig, MtpConfig)
    }[command]
    return load(kind, file, {}, on_removed=lambda text: None)


def check_model(model: str) -> None:
    """Refuse early what can only be a mistake: a path that is not there, a misspelt preset."""
    if model in presets.PRESETS or Path(model).is_dir() or gguf.file_of(model):
        return
    if model.endswith(gguf.SUFFIX):
        raise PolicyError(f"model={model!r}: there is no such file")
    from policies.files import hub

    name, _ = hub.split(model)
    looks_local = model.startswith(("/", ".", "~")) or name.count("/") != 1 or Path(model.split("/")[0]).exists()
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


def refuse_preset(source: PolicySource) -> None:
    """Raises PolicyError for a checkpoint of a run that began with a preset."""
    if source.checkpoint is not None and source.base in presets.PRESETS:
        raise PolicyError(
            f"{source.checkpoint} continues the preset {source.base!r}, whose tokenizer is saved at the end of the run "
            "only; let the run end: --resume auto"
        )


def shape_of(source: PolicySource) -> PretrainedConfig:
    """The configuration of the policy, with what its run asked of it."""
    if not (preset := presets.PRESETS.get(source.base)):
        return as_asked(read_config(source.base, writes=True), source.asked)
    return as_asked(DeepseekV3Config(vocab_size=presets.VOCABULARY, **preset), source.asked)


def as_asked(shape: PretrainedConfig, asked: ModelOptions | None) -> PretrainedConfig:
    """Gives `shape`, which it may change, the attention that `asked` names. Raises PolicyError."""
    if not isinstance(asked, ArchitectureOptions):
        return shape
    if asked.active_heads:
        shape = heads_config(shape, asked.active_heads, shared=0)
    if asked.prompt_attention:
        setattr(shape, PROMPT_ATTENTION, asked.prompt_attention)
    return shape


def asks_for_heads(options: ModelOptions) -> bool:
    """Tells whether the options ask for dynamic heads."""
    return isinstance(options, ArchitectureOptions) and options.active_heads is not None


def known_context(model: str) -> int | None:
    """The longest text in tokens, of a preset or a folder; None of a hub id, whose config may have to be fetched."""
    model = find_policy(model, read=False).base
    if model in presets.PRESETS:
        return int(presets.PRESETS[model]["max_position_embeddings"])
    longest = getattr(read_config(model), "max_position_embeddings", None) if Path(model).exists() else None
    return longest if longest and longest > 0 else None  # XLNet says -1: there is no limit


def read_shape(options: ModelOptions, source: PolicySource | None = None) -> tuple[PretrainedConfig, bool]:
    """The configuration of `options.model`, and whether the policy will have a draft head. Raises PolicyError."""
    source = source or find_policy(options.model, read=False)
    refuse_preset(source)
    shape = as_asked(shape_of(source), options)
    stored = getattr(shape, "num_nextn_predict_layers", 0)
    has_head = isinstance(shape, DeepseekV3Config) and bool(isinstance(options, MtpConfig) or stored)
    return shape, source.base in presets.PRESETS or has_head


def meta_policy(shape: PretrainedConfig, head: bool, dtype: torch.dtype, tokenizer: object = None) -> Policy:
    """A policy without storage."""
    with torch.device("meta"):
        trunk = auto_class(shape).from_config(shape, dtype=dtype)
        mtp = MTPHead(cast(DeepseekV3Config, shape)).cast(dtype) if head else None
    return Policy(trunk, mtp, tokenizer)


def with_threads(config: Config, resume: str | None, shape: PretrainedConfig) -> Config:
    """`config` with a number of threads, which torch uses from now on.

    `config.threads` where it is given, else what a resumed run had (see `saved_threads`), else by the policy's `shape`.
    """
    threads = config.threads or saved_threads(config.output_dir, resume)
    if threads is None:
        trunk = meta_policy(shape, False, torch.float32).trunk
        threads = threads_for(sum(parameter.numel() for parameter in trunk.parameters()))
    torch.set_num_threads(threads)
    return cast(Config, config.model_copy(update={"threads": threads}))


def load_policy(
    options: ModelOptions, corpus: Iterable[str] = (), ranks: Ranks = ONE_PROCESS, *, head: bool = False
) -> Policy:
    """The policy that `options.model` means, on its device: a preset gets fresh weights, and a tokenizer learned from
    `corpus`. Several ranks share it, as `learner.parallel` says; what is not in safetensors rank 0 makes for all.
    `quartet mtp` gives a draft head to a policy that has none, and so does `head`.

    Raises PolicyError or CheckpointError for what cannot be loaded.
    """
    source = find_policy(options.model, read=ranks.first)
    if ranks.layout is None:
        return load_found(source, options, corpus, head=head)
    with tempfile.TemporaryDirectory() as folder:
        if (
            source.folder in presets.PRESETS
            or gguf.file_of(source.folder)
            or source.checkpoint
            or asks_for_heads(options)
        ):
            files = ranks.from_first(lambda: _files(load_found(source, options, corpus, head=head), Path(folder)))
            source = replace(source, folder=folder, checkpoint=None)
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
        return _load(source.folder, options, layout=ranks.layout, head=head)


def load_beside(options: ModelOptions, model: str) -> Policy:
    """Loads another policy, such as a teacher, in the precision and on the device of the one that `options` mean."""
    return load_policy(ModelOptions(model=model, dtype=options.dtype, device=options.device))


def template_options(options: object) -> dict[str, Any]:
    """What a run hands to the chat template wherever it writes a prompt."""
    data = getattr(options, "data", None)
    first = data[0] if isinstance(data, list) else data
    return getattr(first, "chat_template_kwargs", {})


def in_4_bits(options: object) -> bool:
    """Tells whether a run keeps the weights under its adapters in 4 bits."""
    return getattr(getattr(options, "lora", None), "base", None) == "nf4"


def _files(policy: Policy, folder: Path) -> dict[str, bytes]:
    policy.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_found(
    source: PolicySource,
    options: ModelOptions,
    corpus: Iterable[str] = (),
    *,
    merged: bool = True,
    head: bool = False,
) -> Policy:
    """The policy of `source` on its device; without `merged` a LoRA checkpoint keeps its adapters apart."""
    if source.checkpoint is None or source.saved is None:
        return _load(source.folder, options, corpus, nf4=in_4_bits(options), head=head)
    return _as_asked(_load_checkpoint(source, source.saved, options, merged), options)


def _load(
    model: str,
    options: ModelOptions,
    corpus: Iterable[str] = (),
    layout: DistributedConfig | None = None,
    nf4: bool = False,
    head: bool = False,
) -> Policy:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    with phase("loading", options):
        if model in presets.PRESETS:
            policy = presets.build(model, corpus, options.seed).cast(dtype)
        else:
            check_policy(Path(model))
            adds_head = head or isinstance(options, MtpConfig)
            policy = Policy.load(model, dtype, add_mtp=adds_head, seed=options.seed, layout=layout, in_4_bits=nf4)
        if not options.threads:
            torch.set_num_threads(threads_for(sum(parameter.numel() for parameter in policy.trunk.parameters())))
        if layout is None:
            policy = policy.to(device_of(options.device))
    _as_asked(policy, options)
    if policy.backend == "transformers":
        from grpo.source.agreement import check_agreement

        check_agreement(policy)
    return policy


def _as_asked(policy: Policy, options: ModelOptions) -> Policy:
    policy.tokenizer.chat_template_kwargs = template_options(options)
    if isinstance(options, ArchitectureOptions):
        policy.attend_to_prompts(options.prompt_attention)
        if options.active_heads:
            policy.choose_heads(options.active_heads, 0, options.seed)
    return policy


def holds_head(saved: Checkpoint) -> bool:
    """Whether a checkpoint has an MTP head. Its base model may have none: runs of 0.2 could add one."""
    return any(name.startswith("mtp.") for name in saved.tensors["policy"])


def _load_checkpoint(source: PolicySource, saved: Checkpoint, options: ModelOptions, merged: bool) -> Policy:
    assert source.checkpoint is not None
    config, base = _run_config(run_of(source.checkpoint)), source.base
    refuse_preset(source)
    asked = {name: getattr(options, name) for name in ("dtype", "threads", "device")}
    like_the_run = config.model_copy(update=asked)
    head = holds_head(saved) or isinstance(options, MtpConfig)
    policy = _load(base, like_the_run, nf4=in_4_bits(config), head=head)
    if isinstance(config, MtpConfig):
        policy.draft_ids = saved.tensors["draft"]["ids"].to(policy.device) if "draft" in saved.tensors else None
    elif isinstance(config, TrainConfig) and config.lora:
        policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
        same_precision = options.dtype == config.dtype  # in another one every weight has other bits
        if same_precision and (changed := base_changed(policy, saved, f"model={base!r}")):
            raise PolicyError(changed)
    _copy(saved.tensors["policy"], policy, source.checkpoint)
    if merged and isinstance(config, TrainConfig) and config.lora:
        plain = _load(base, like_the_run, head=head)
        plain.load_weights(policy.weights())
        return plain
    return policy


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], policy: Policy, where: Path) -> None:
    held = dict(policy.named_parameters()) | dict(policy.named_buffers())
    if wrong := [name for name, tensor in tensors.items() if name not in held or held[name].shape != tensor.shape]:
        raise PolicyError(f"{where} holds tensors that its run's model does not have: {wrong[:5]}")
    for name, tensor in tensors.items():
        held[name].copy_(tensor)


def save_policy(policy: Policy, folder: Path, step: int) -> None:
    """Write a run's policy, then the step that it is of, and by its digest the checkpoint that holds the same weights.

    A copy of the run says the same: no file time is looked at.
    """
    policy.save(folder)
    if not leads():
        return
    path = checkpoint.saved(folder.parent / "checkpoints").get(step)
    write_file(folder / RECORD, json.dumps({"step": step, "checkpoint": _digest(path) if path else None}) + "\n")
    write_checksums(folder)


def _went_on(run: Path, newest: Path) -> bool:
    """Whether `policy/` was not saved with the checkpoint `newest`: the run continued, or went back, without it."""
    record = _record(run / "policy")
    if record.get("checkpoint"):
        return record["checkpoint"] != _digest(newest)
    end = record.get("step")
    return end is not None and end != _step_of(newest)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return read_json(path) if path.is_file() else {}


def _digest(checkpoint_folder: Path) -> str:
    return hashlib.sha256((checkpoint_folder / checkpoint.MANIFEST).read_bytes()).hexdigest()


def _step_of(checkpoint_folder: Path) -> int | None:
    step = checkpoint_folder.name.removeprefix("step_")
    return int(step) if step.isdecimal() else None  # a copy may have another name
