"""What can be seen without weights that a run refuses: each function checks one thing, and raises what is wrong."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, GenerationConfig, PreTrainedTokenizerBase

from grpo.algorithm import own
from grpo.config.mtp import MtpConfig
from grpo.config.run import RunConfig, SftConfig, TrainConfig
from grpo.learner.parallel import refuse_processes
from grpo.learner.terms.balance import PREFIX, loads_of
from grpo.run import trackers
from grpo.run.hardware import device_of
from grpo.source.policy_source import check_options, find_policy, read_shape
from grpo.task.sampling import refuse_compile
from grpo.task.task import Task
from policies import presets
from policies.checkpoint import check_files
from policies.layout import find_file
from policies.mtp import MTPHead
from policies.policy import Policy, PolicyError, read_tokenizer
from policies.routing.routers import routers
from rollout.faults import RolloutError


def check_model(config: SftConfig | MtpConfig) -> None:
    """The model, and what goes with it; of a folder also its files, if it has weights."""
    able = {"add_mtp": True} if isinstance(config, MtpConfig) else {}  # the model must be able to have a head
    check_options(config.model_copy(update=able))
    if has_files(config):
        check_files(Path(find_policy(config.model, read=False).folder))
    check_shape(config)
    if isinstance(config, TrainConfig) and config.distill.teacher is not None:
        from grpo.task.reward_models import check_teacher

        check_teacher(config)


def check_own_functions(config: SftConfig | MtpConfig) -> None:
    if isinstance(config, TrainConfig):
        own.try_out(config.loss, config.rollout.group_size)


def check_trackers(config: SftConfig | MtpConfig) -> None:
    trackers.installed(config.log.trackers)


def check_processes(config: SftConfig | MtpConfig, on_cpu: bool) -> None:
    """How many processes learn and sample, and where."""
    launched = "WORLD_SIZE" in os.environ
    if isinstance(config, MtpConfig):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "quartet mtp teaches in one process; start it without accelerate (rollout.workers may sample)"
            )
        return
    if not launched and (config.learner.workers or config.rollout.samplers):
        from rollout.places import refuse_open

        refuse_open()
    refuse_processes(on_cpu, config.learner.parallel, 0 if launched else config.learner.workers)
    if config.learner.workers and not launched and not on_cpu:
        gpu_share(config)


def check_shape(config: SftConfig | MtpConfig) -> None:
    """What a model of this shape cannot do; it is built without storage."""
    from grpo.source.agreement import refuse_rescaled

    policy, rollout = bare_policy(config), config.rollout
    refuse_rescaled(policy.config)
    if isinstance(config, MtpConfig):
        if policy.mtp is None:
            raise PolicyError(f"add_mtp=False, but model={config.model!r} has no MTP head to teach; leave add_mtp out")
        return
    loads_of(policy, config.balance)
    if not isinstance(config, TrainConfig):
        return
    if rollout.draft_tokens and policy.mtp is None:
        raise RolloutError(
            f"rollout.draft_tokens={rollout.draft_tokens}, but this policy has no MTP head; set it to 0, or load the "
            "policy with a head"
        )
    native = isinstance(policy.config, DeepseekV3Config)
    chooses = native and any(routers(policy.trunk, part) for part in PREFIX)
    if config.learner.routing_replay and not chooses:
        raise RolloutError(
            "learner.routing_replay: this policy has no experts or dynamic heads to be replayed; drop it"
        )
    refuse_compile(policy, rollout, config.dtype, device_of(config.device))
    if config.lora:
        policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)


CHECKS = (check_own_functions, check_trackers, check_model)


def check_prompts(config: SftConfig | MtpConfig, task: Task) -> None:
    """Whether every prompt leaves room for its completion, which the run sees when it has its tokenizer. Nothing is
    checked of a folder that has no tokenizer, since only its shape can be asked for."""
    tokenizer = tokenizer_of(config, task)
    if tokenizer is None:
        return
    policy = bare_policy(config, tokenizer)
    if isinstance(config, TrainConfig | MtpConfig) or task.heldout:
        task.check_lengths(policy, config.rollout.max_completion_tokens)
    _ = policy.stop_token_ids  # raises where there is none


def gpu_share(config: SftConfig) -> float:
    """What Ray gives each rank of a GPU: all of it, or with `rollout.colocate` what a worker leaves.

    More than half, so that no two ranks get the same one. Raises ValueError where a worker would leave less.

    >>> gpu_share(TrainConfig(output_dir="r", rollout={"workers": 2, "colocate": True, "gpus_per_worker": 0.4}))
    0.6
    """
    rollout = config.rollout
    if not (rollout.colocate and rollout.samplers):
        return 1.0
    if rollout.gpus_per_worker >= 0.5:
        raise ValueError(
            f"rollout.gpus_per_worker={rollout.gpus_per_worker:g} with rollout.colocate=true and learner.workers="
            f"{config.learner.workers}: Ray places both, and each learner needs more than half of a GPU, so that no "
            "two share one; set it to 0.4"
        )
    return round(1.0 - rollout.gpus_per_worker, 4)  # Ray knows ten-thousandths


def has_files(config: RunConfig) -> bool:
    """Whether `model` is a policy's folder with weights, and not a preset, a hub id, a checkpoint of a run, or the
    configuration of a model alone."""
    source = find_policy(config.model, read=False)
    return source.checkpoint is None and any(Path(source.folder).glob("*.safetensors"))


def bare_policy(config: RunConfig, tokenizer: Any = None) -> Policy:
    """The policy without storage."""
    shape, head = read_shape(config)
    with torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype))
        mtp = MTPHead(shape) if head and isinstance(shape, DeepseekV3Config) else None
    policy = Policy(trunk, mtp, tokenizer)
    base = find_policy(config.model, read=False).base
    with suppress(OSError):  # there is none
        if base not in presets.PRESETS and Path(base).is_dir():
            policy.trunk.generation_config = GenerationConfig.from_pretrained(base)
    return policy


def tokenizer_of(config: RunConfig, task: Task) -> PreTrainedTokenizerBase | None:
    base = find_policy(config.model, read=False).base
    if base in presets.PRESETS:
        return presets.small_tokenizer(task.corpus(), presets.VOCABULARY)
    if not has_files(config) and Path(base).is_dir() and not find_file(base, "tokenizer_config.json"):
        return None
    return read_tokenizer(base)
