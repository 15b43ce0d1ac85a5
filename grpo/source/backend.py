"""Which engine samples in a run: what can be seen not to work before a model is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from transformers import DeepseekV3Config, PretrainedConfig

from grpo.config.policy import ModelOptions, PolicyOptions
from grpo.config.run import RunConfig, SftConfig, TrainConfig
from grpo.config.sampling import VLLMOptions
from policies.attention import PROMPT_ATTENTION, sees_prompts_whole
from policies.routing.heads import DynamicHeadsConfig, heads_config

FIXED = (  # arguments of vLLM's engine
    *("model", "dtype", "load_format", "logprobs_mode", "seed", "skip_tokenizer_init", "speculative_config"),
    *("trust_remote_code", "worker_extension_cls", "per_request_spec_decode_metrics"),
)


def refuse_backend(config: Any, read_shape: Callable[[], PretrainedConfig]) -> None:
    """Raises ValueError or RolloutError where `rollout.backend` cannot sample a model of this shape in this run."""
    _refuse_prefix_lm(config, read_shape)
    _refuse_heads(config, read_shape)
    _refuse_copies(config, read_shape)
    if not isinstance(config, RunConfig) or config.rollout.backend is None:
        return
    backend, shape = config.rollout.backend, read_shape()
    native = isinstance(shape, DeepseekV3Config)
    if backend == "native" and not native:
        raise ValueError(
            f"rollout.backend=native decodes DeepSeek-V3 policies, and model={config.model!r} is of type "
            f"{shape.model_type!r}: leave it out, or convert the model (quartet convert)"
        )
    if backend == "transformers" and native:
        raise ValueError(
            f"rollout.backend=transformers: model={config.model!r} is a DeepSeek-V3 policy, which our engine decodes "
            "with drafts and faster; leave it out"
        )
    if backend == "vllm":
        _refuse_options(config)
        _refuse_model(config, shape)
        if os.environ.get("RANK", "0") == "0":  # of several learners the first one samples
            _refuse_server(config.rollout.vllm)


def as_asked(shape: PretrainedConfig, asked: PolicyOptions) -> PretrainedConfig:
    """`shape`, which it may change, with the heads and the attention to prompts of `asked`. Raises PolicyError."""
    if asked.heads:
        shape = heads_config(shape, asked.heads.active, asked.heads.shared)
    if asked.prompt_attention:
        setattr(shape, PROMPT_ATTENTION, asked.prompt_attention)
    return shape


def ours_alone(shape: PretrainedConfig) -> str | None:
    """What a policy of this shape computes that vLLM and stock transformers do not, by its option; None: nothing.

    They read a prompt causally without a word, and refuse dynamic heads.
    """
    if sees_prompts_whole(shape):
        return "policy.prompt_attention=bidirectional"
    return "dynamic heads (policy.heads)" if isinstance(shape, DynamicHeadsConfig) else None


def _refuse_copies(config: Any, read_shape: Callable[[], PretrainedConfig]) -> None:
    """Matrices in few bits are for GRPO, which corrects for them, and for our engine."""
    if not isinstance(config, RunConfig) or config.rollout.copies == ("none", "none"):
        return
    name = "quantization" if config.rollout.quantization != "none" else "draft_quantization"
    asked = f"rollout.{name}={getattr(config.rollout, name)}"
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{asked} is for quartet train, which corrects for another sampler; drop it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{asked} with several learners: canaries make the matrices afresh of whole weights, which no rank has; "
            "drop it, or use one learner"
        )
    if not isinstance(shape := read_shape(), DeepseekV3Config):
        raise ValueError(
            f"{asked}: model={config.model!r} is of type {shape.model_type!r}, which transformers samples, and our own "
            "engine alone makes such copies; drop it, or convert the model (quartet convert)"
        )


def _refuse_prefix_lm(options: ModelOptions, read_shape: Callable[[], PretrainedConfig]) -> None:
    """What a policy that sees its prompts whole cannot be, or do."""
    rollout, asked = getattr(options, "rollout", None), options.policy.prompt_attention
    agent = getattr(options, "agent", None)
    doubtful = rollout and (rollout.backend == "vllm" or agent)
    if asked == "causal" or not (asked or doubtful):
        return
    shape = read_shape()
    if not (asked or sees_prompts_whole(shape)):
        return
    what = f"policy.prompt_attention=bidirectional ({'as asked' if asked else 'so model says in config.json'})"
    if not isinstance(shape, DeepseekV3Config):
        raise ValueError(
            f"{what}: model={options.model!r} is of type {shape.model_type!r}, which masks its prompts by itself; make "
            "it a DeepSeek-V3 policy first (`quartet convert SRC DST`), or leave prompt_attention out"
        )
    if rollout and rollout.backend == "vllm":
        raise ValueError(f"{what}: vLLM attends to prompts causally alone; leave rollout.backend out")
    if agent:
        raise ValueError(
            f"agent={agent} with {what}: what the policy has written is a part of the next request's prompt, and would "
            "be seen whole too; use a policy that attends causally"
        )


def _refuse_heads(options: ModelOptions, read_shape: Callable[[], PretrainedConfig]) -> None:
    """Dynamic heads that do not fit the model, that nothing would train, or that an engine cannot choose."""
    asked, rollout = options.policy.heads, getattr(options, "rollout", None)
    if rollout and rollout.backend == "vllm" and (asked or isinstance(read_shape(), DynamicHeadsConfig)):
        raise ValueError("rollout.backend=vllm: vLLM computes all heads, and policy.heads leaves some out; drop one")
    if not asked:
        return
    shape = read_shape()
    if heads_config(shape, asked.active, asked.shared) is shape:
        return  # it has learned with routers
    lora = getattr(options, "lora", None)
    if not isinstance(options, SftConfig):
        why, way_out = "nothing would train them here", "use quartet sft or train first"
    elif lora and lora.base:
        why = "they cannot be added to weights in 4 bits"
        way_out = "add them by quartet sft, and name its policy as the model"
    elif lora and not options.warm_start.steps and "head_router" not in (lora.targets or ()):
        why, way_out = "adapters alone do not train them", "add head_router to lora.targets, or use warm_start.steps"
    else:
        return
    raise ValueError(f"policy.heads: model={options.model!r} has no routers of heads, and {why}; {way_out}")


def _refuse_options(config: RunConfig) -> None:
    rollout = config.rollout
    if not isinstance(config, TrainConfig):
        raise ValueError("rollout.backend=vllm is for quartet train; this command samples with our own engine: drop it")
    if rollout.workers:
        raise ValueError(
            f"rollout.workers={rollout.workers} with rollout.backend=vllm: vLLM is one server, which batches "
            "by itself; set it to 0, and rollout.vllm.engine={tensor_parallel_size: N} to use several GPUs"
        )
    if config.learner.routing_replay:
        raise ValueError(
            "learner.routing_replay: vLLM 0.32 returns the experts that it chose with its second model runner alone, "
            "which needs Triton: on a CPU it refuses to start, and on CUDA nobody has tried it; set it to false"
        )
    if rollout.draft_tokens and config.curriculum.draft_depth is not None:
        raise ValueError(
            f"curriculum.draft_depth={config.curriculum.draft_depth}: vLLM drafts at one depth, "
            f"rollout.draft_tokens={rollout.draft_tokens}; drop one of them"
        )
    if rollout.draft_tokens and config.log.measure_speed:
        raise ValueError("log.measure_speed: vLLM cannot leave its drafts out; set it to false, or draft_tokens to 0")
    if fixed := [name for name in FIXED if name in rollout.vllm.engine]:
        raise ValueError(f"rollout.vllm.engine.{fixed[0]}: quartet sets it, by its own options; drop it")


def _refuse_model(config: RunConfig, shape: PretrainedConfig) -> None:
    rope = getattr(shape, "rope_parameters", None) or {}
    if isinstance(shape, DeepseekV3Config) and rope.get("rope_type") == "longrope":
        raise ValueError(
            f"model={config.model!r} is a dense model in MLA form, whose rotary frequencies vLLM does not compute (it "
            "divides by zero): name the dense original as the model (its exact form is the same policy), or leave "
            "rollout.backend out"
        )


def _refuse_server(options: VLLMOptions) -> None:
    """Asks the server, or the interpreter that would run it, for its version. A server has ten seconds to answer."""
    from grpo.source.vllm_token import vllm_token
    from rollout.backends.vllm.client import Client
    from rollout.backends.vllm.process import state_of

    if options.url:
        state, where = Client(options.url, vllm_token(options)).state(), f"rollout.vllm.url={options.url}"
    else:
        if sys.platform != "linux":
            raise ValueError(
                "rollout.backend=vllm: quartet starts vLLM's server on Linux alone; leave rollout.backend out, or give "
                "the address of a server that runs on Linux (rollout.vllm.url)"
            )
        if not options.python.is_file():
            raise ValueError(
                f"rollout.vllm.python={options.python}: there is no such interpreter here; `make vllm` installs vLLM "
                "into .vllm, or name the one of another environment"
            )
        state, where = state_of(options.python), f"rollout.vllm.python={options.python}"
    if not (state["tried"] or options.untried_version):
        tried = ", ".join(state["tried_versions"])
        raise ValueError(
            f"{where}: nobody has compared the log-probabilities of vLLM {state['vllm']} with ours, and older "
            f"ones were silently wrong on CPUs; install one of {tried} (make vllm), or set "
            "rollout.vllm.untried_version"
        )
