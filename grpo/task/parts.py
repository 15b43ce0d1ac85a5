"""What takes more than a row of the table to see, without weights: each function checks one thing, and raises what is
wrong with it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from grpo.algorithm import own
from grpo.config.mtp import MtpConfig
from grpo.config.run import LearningConfig, RunConfig, TrainConfig
from grpo.config.sampling import VLLMOptions
from grpo.learner.build import check_terms
from grpo.learner.parallel import refuse_layout, refuse_processes
from grpo.run import trackers
from grpo.source.policy_source import template_options
from grpo.task.plan import Plan
from grpo.task.table import asked
from grpo.task.task import Task
from policies import four_bit, presets
from policies.checkpoint import check_files, note_own_code
from policies.devices import device_of
from policies.layout import find_file
from policies.policy import Policy, PolicyError, read_tokenizer

LOGGER = logging.getLogger(__name__)


def check_own_functions(plan: Plan) -> None:
    if isinstance(plan.options, TrainConfig):
        own.try_out(plan.options.loss, plan.options.rollout.group_size)


def check_trackers(plan: Plan) -> None:
    if isinstance(plan.options, RunConfig):
        trackers.installed(plan.options.log.trackers)


def check_weights(plan: Plan) -> None:
    """The files of a folder, if it has weights. Code in it is noted in the words of the run."""
    if not isinstance(plan.options, RunConfig):
        return
    if plan.source.base not in presets.PRESETS:
        note_own_code(plan.source.base)
    if plan.has_files:
        check_files(Path(plan.source.folder))


def check_packing(plan: Plan) -> None:
    """Raises PolicyError for weights that stay packed: a policy with them cannot be saved, see `first_policy`."""
    options, packing = plan.options, getattr(plan.shape, "quantization_config", None)
    if not isinstance(options, RunConfig) or packing is None or asked(plan, "lora.base=nf4"):
        return
    from policies.files.packed import stays_packed

    method = dict(packing).get("quant_method")
    if method == "bitsandbytes":
        raise PolicyError(stays_packed(options.model, method))


def check_shape(plan: Plan) -> None:
    """Raises what a model of this shape cannot do; it is built without storage."""
    options = plan.options
    if not isinstance(options, RunConfig):
        return
    policy = plan.bare_policy()
    if isinstance(options, LearningConfig):
        check_terms(policy, options)
    if isinstance(options, TrainConfig) and options.lora:
        policy.add_lora(options.lora.rank, options.lora.alpha, options.lora.targets)


def check_layout(plan: Plan) -> None:
    options = plan.options
    if (
        isinstance(options, LearningConfig)
        and max(options.learner.parallel.tensor, options.learner.parallel.expert) > 1
    ):
        lora = options.lora if isinstance(options, TrainConfig) else None
        refuse_layout(options.learner.parallel, plan.shape, lora, getattr(torch, options.dtype).itemsize)


def try_teacher(plan: Plan) -> None:
    if isinstance(plan.options, TrainConfig) and asked(plan, "distill.teacher"):
        from grpo.task.reward_models import check_teacher

        check_teacher(plan.options)


def try_four_bits(plan: Plan) -> None:
    if asked(plan, "lora.base=nf4"):
        four_bit.try_out(device_of(plan.options.device))


def try_vllm(plan: Plan) -> None:
    """Asks vLLM's server what it is. Where several processes learn, the first one samples, and so it alone asks."""
    samples = os.environ.get("RANK", "0") == "0"
    if samples and isinstance(plan.options, TrainConfig) and asked(plan, "rollout.backend=vllm"):
        _ask_server(plan.options.rollout.vllm)


def check_processes(plan: Plan, on_cpu: bool) -> None:
    """Checks how many processes learn and sample, and where: there must be room for them."""
    config = plan.options
    if not isinstance(config, LearningConfig):
        return
    launched, workers = "WORLD_SIZE" in os.environ, config.learner.workers
    if not launched and (workers or config.whole_rollout.samplers):
        from rollout.places import refuse_open

        refuse_open()
    refuse_processes(on_cpu, config.learner.parallel, 0 if launched else workers)


def check_prompts(plan: Plan, task: Task) -> None:
    """Checks that every prompt leaves room for its completion, which the run sees when it has its tokenizer. Nothing
    is checked of a folder that has no tokenizer, since only its shape can be asked for."""
    tokenizer = tokenizer_of(plan, task)
    if tokenizer is None:
        return
    config, policy = plan.options, plan.bare_policy(tokenizer)
    if isinstance(config, RunConfig):
        check_lengths(task, policy, config)
    _ = policy.stop_token_ids  # raises where there is none


def check_lengths(task: Task, policy: Policy, config: RunConfig, *, begins: bool = True) -> None:
    """Raises ValueError for prompts that do not fit into the context of the policy, and in a run that `begins`, for the
    solutions of its supervised steps. Version 0.2 learned from solutions of any length: its runs continue so."""
    samples = bool(task.held_out) or isinstance(config, TrainConfig | MtpConfig)
    supervises = isinstance(config, LearningConfig) and config.supervision.steps > 0
    if samples or supervises:
        longest = config.rollout.max_completion_tokens if samples else None
        task.check_lengths(policy, longest, learns_solutions=supervises and begins)


def tokenizer_of(plan: Plan, task: Task) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a run before its policy is loaded; None for a folder that has none."""
    base = plan.source.base
    if base in presets.PRESETS:
        return presets.small_tokenizer(task.corpus(), presets.VOCABULARY)
    if not plan.has_files and os.path.isdir(base) and not find_file(base, "tokenizer_config.json"):
        return None
    tokenizer = read_tokenizer(base)
    tokenizer.chat_template_kwargs = template_options(plan.options)
    return tokenizer


def _ask_server(options: VLLMOptions) -> None:
    """Asks the server, or the interpreter that would run it, for its version. A server has ten seconds to answer."""
    from grpo.source.vllm_token import installed_vllm, vllm_token
    from rollout.vllm.client import Client
    from rollout.vllm.process import interpreter

    if options.url:
        state, where = Client(options.url, vllm_token(options)).state(), f"rollout.vllm.url={options.url}"
    else:
        state, where = installed_vllm(), str(interpreter())
    if not state["tried"]:
        LOGGER.warning(
            "%s: nobody has compared the log-probabilities of vLLM %s with ours, and older ones were silently wrong on "
            "CPUs. Every weight sync compares a few; tested: %s (make vllm)",
            *(where, state["vllm"], ", ".join(state["tried_versions"])),
        )


FIRST = (check_own_functions, check_trackers)
OF_MODEL = (check_weights, check_packing, check_shape, check_layout)
TRIES = (try_four_bits, try_vllm, try_teacher)  # they ask libraries, tokenizers and servers
