"""The one pass over the table of what does not go with what, which is table.yaml, and how what it names is seen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from grpo.config.loss import LossOptions
from grpo.config.mtp import MtpConfig
from grpo.config.run import TrainConfig
from grpo.source.policy_source import asks_for_heads, shape_of
from grpo.task.plan import REFUSALS, Plan
from grpo.task.sampling import no_graph
from policies import presets
from policies.attention import sees_prompts_whole
from policies.devices import device_of, has_bfloat16
from policies.files import gguf
from policies.policy import read_tokenizer
from policies.routing.heads import DynamicHeadsConfig
from policies.routing.routers import has_routers
from rewards.config.data import names_of
from rewards.config.yaml_file import parse_yaml, to_yaml
from rewards.registry import MODEL

ENGINE = (  # arguments of vLLM's engine that quartet sets
    *("model", "dtype", "load_format", "logprobs_mode", "seed", "skip_tokenizer_init", "speculative_config"),
    *("trust_remote_code", "worker_extension_cls", "per_request_spec_decode_metrics"),
)
Form = Callable[[Any], str | bool]  # its words in a message, or True for its name; nothing where it is not there


@cache
def table() -> dict[str, dict[str, str]]:
    """Maps what a plan asks for to what it does not go with, and why.

    >>> table()["eval.every"]
    {'eval.limit=0': 'that evaluates nothing; set eval.limit, or drop eval.every'}
    """
    rows: dict[str, dict[str, str]] = {}
    for lefts, others in content()["not_with"].items():
        row = {right: why for rights, why in others.items() for right in rights.split(", ")}
        for left in lefts.split(", "):
            rows[left] = rows.get(left, {}) | row
    return rows


@cache
def content() -> dict[str, Any]:
    """`not_with` and `packages` as they are written."""
    return parse_yaml(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def contradictions(plan: Plan) -> Iterator[str]:
    """A line for each: the keys, their values, why they do not go together, and the way out."""
    for left, others in table().items():
        this = asked(plan, left)
        for right, why in others.items() if this else ():
            other = asked(plan, right)
            first, second = (this, other) if right in FORMS else (other, this)
            if other:
                yield f"{first} with {second}: {why}"
    for what, (packages, extra, way_out) in content()["packages"].items():
        this = asked(plan, what)
        if this and any(find_spec(package) is None for package in packages.split()):
            yield f"{this} needs {packages.replace(' ', ' and ')}: pip install 'quartet-rl[{extra}]', or {way_out}"


def asked(plan: Plan, what: str) -> str:
    """Says how the plan asks for this, in the words of a message; empty where it does not."""
    if what in SITUATIONS:
        words = SITUATIONS[what](plan.options)
        return what if words is True else words or ""
    if what in MODELS:
        words = _of_model(plan, MODELS[what])
        if words is True:
            return f"model={plan.options.model!r} of type {plan.shape.model_type!r} ({what})"
        return words or ""
    key, sign, values = re.split(r"(!?=|$)", what, maxsplit=1)
    value = option(plan.options, key)
    holds = (_word(value) in values.split("|")) is (sign == "=") if sign else bool(value)
    return f"{key}={_word(value)}" if holds else ""


def option(options: object, key: str) -> Any:
    """The value of `rollout.workers` and the like; None where a command has no such option."""
    for name in key.split("."):
        options = getattr(options, name, None)
        if name == "data" and isinstance(options, list) and key != "data":
            options = options[0]
    return options


def _of_model(plan: Plan, form: Form) -> str | bool:
    """Asks for a form of the model; it has none where it cannot be read, which is then the plan's fault."""
    try:
        return not plan.fault and form(plan)
    except REFUSALS as error:
        plan.fault = error
        return False


def _word(value: object) -> str:
    return value if isinstance(value, str) else to_yaml(value, inline=True)


# ---- what is no single option ---------------------------------------------------------------------------------------


def _ranks(options: object) -> str:
    """Several processes that learn, as far as the options and the launcher say."""
    layout = option(options, "learner.parallel")
    shares = (layout.fsdp or 1, layout.expert, layout.tensor) if layout else ()
    several = max(int(os.environ.get("WORLD_SIZE", "1")), option(options, "learner.workers") or 0, *shares) > 1
    return "several ranks (learner.workers, learner.parallel, accelerate launch or torchrun)" if several else ""


def _sources(options: object) -> str:
    data = option(options, "data")
    return f"data=[...] ({names_of(data)})" if isinstance(data, list) and len(data) > 1 else ""


def _reward_model(options: object) -> str:
    functions = [reward.function for reward in option(options, "rewards") or []]
    return next((f"rewards[].function={name}" for name in functions if name.startswith(MODEL)), "")


def _teacher_at_server(options: object) -> str:
    return f"distill.teacher={option(options, 'distill.teacher')}" if option(options, "distill.url") else ""


def _shortest(options: object) -> str:
    share = option(options, "curriculum.shortest_share") or 1.0
    return f"curriculum.shortest_share={_word(share)}" if share < 1 else ""


def _drafts_of_vllm(options: object) -> str:
    drafts = option(options, "rollout.backend") == "vllm" and option(options, "rollout.draft_tokens")
    return f"rollout.draft_tokens={drafts} of vLLM" if drafts else ""


def _set_by_quartet(options: object) -> str:
    engine = option(options, "rollout.vllm.engine") or {}
    return ", ".join(f"rollout.vllm.engine.{name}={_word(engine[name])}" for name in ENGINE if name in engine)


def _taught_head(options: object) -> str:
    mtp = option(options, "mtp")
    changed = [(name, value) for name, value in mtp or () if value != getattr(type(mtp)(), name)]
    return ", ".join(f"mtp.{name}={_word(value)}" for name, value in changed) if option(mtp, "loss_weight") else ""


def _clip_above_delta(options: object) -> str:
    loss: LossOptions | None = option(options, "loss")
    if loss is None or loss.delta is None:
        return ""
    name = "epsilon" if loss.epsilon_high is None else "epsilon_high"
    high = getattr(loss, name)
    return f"loss.{name}={_word(high)} (a clip range that ends at {1 + high:g})" if loss.delta < 1 + high else ""


def _reads_no_ratio(options: object) -> str:
    """The KL penalty weighs its estimate by the ratio."""
    loss: LossOptions | None = option(options, "loss")
    no_ratio = loss is not None and loss.loss_type == "reinforce" and not loss.beta
    return "loss.loss_type=reinforce, which reads no ratio" if no_ratio else ""


def _no_value_head(options: object) -> str:
    """Asked of commands that have options of a value head."""
    advantage = option(options, "loss.advantage")
    has_none = option(options, "value") is not None and advantage not in (None, "gae", "rank_softmax")
    return f"loss.advantage={advantage}, which has no value head" if has_none else ""


def _device_that(holds: Callable[[torch.device], bool]) -> Form:
    """The form of a run on such a device."""
    return lambda options: holds(device := device_of(option(options, "device"))) and f"device={device}"


def _adapters_alone(options: object) -> bool:
    lora = option(options, "lora")
    return bool(lora and not option(options, "sft.steps") and "head_router" not in (lora.targets or ()))


def _preset_as_teacher(options: object) -> str:
    teacher = option(options, "distill.teacher")
    return f"distill.teacher={teacher} (a preset)" if teacher in presets.PRESETS else ""


def _no_chat_template(plan: Plan) -> bool:
    base = plan.source.base
    return base in presets.PRESETS or not read_tokenizer(base).chat_template


def _prompt_seen_whole(plan: Plan) -> str:
    why = "as asked" if option(plan.options, "prompt_attention") else "so model says in config.json"
    return f"prompt_attention=bidirectional ({why})" if sees_prompts_whole(plan.shape) else ""


def _new_heads(plan: Plan) -> str:
    new = asks_for_heads(plan.options) and not isinstance(shape_of(plan.source), DynamicHeadsConfig)
    return f"new active_heads (model={plan.options.model!r} has no routers of attention heads)" if new else ""


def _no_routers(plan: Plan) -> bool:
    return plan.native and not has_routers(plan.bare_policy().trunk)


def _no_graphs(plan: Plan) -> str:
    options = plan.options
    sampling: Any = option(options, "rollout") or options
    why = no_graph(plan.native, device_of(options.device), sampling)
    return f"a sampler without graphs ({why})" if why else ""


def _dense_in_mla_form(plan: Plan) -> bool:
    rope = getattr(plan.shape, "rope_parameters", None) or {}
    return plan.native and rope.get("rope_type") == "longrope"


SITUATIONS: Mapping[str, Form] = {
    "quartet train": lambda options: isinstance(options, TrainConfig),
    "quartet mtp": lambda options: isinstance(options, MtpConfig),
    "several ranks": _ranks,
    "several sources of data": _sources,
    "a curriculum of the shortest": _shortest,
    "a clip range that ends above it": _clip_above_delta,
    "a loss that reads no ratio": _reads_no_ratio,
    "no value head": _no_value_head,
    "a preset": lambda options: options.model in presets.PRESETS and f"model={options.model!r} (a preset)",
    "a GGUF file": lambda options: bool(gguf.file_of(options.model)) and f"model={options.model!r} (a GGUF file)",
    "drafts of vLLM": _drafts_of_vllm,
    "an argument of vLLM's engine": _set_by_quartet,
    "training of the draft head": _taught_head,
    "a reward model": _reward_model,
    "a teacher at a server": _teacher_at_server,
    "an accelerator": _device_that(lambda device: device.type != "cpu"),
    "an accelerator without bfloat16": _device_that(lambda device: has_bfloat16(device) is False),
    "Apple's GPU": _device_that(lambda device: device.type == "mps"),
    "adapters alone": _adapters_alone,
    "a teacher that is a preset": _preset_as_teacher,
}
MODELS: Mapping[str, Form] = {  # what only the model's own files tell
    "a checkpoint of a run": lambda plan: plan.source.checkpoint is not None,
    "a DeepSeek-V3 policy": lambda plan: plan.native,
    "another architecture": lambda plan: not plan.native,
    "a dense model in MLA form": _dense_in_mla_form,
    "no draft head": lambda plan: plan.native and not plan.head and plan.source.checkpoint is None,
    "no experts or dynamic heads": _no_routers,
    "no chat template": _no_chat_template,
    "a prompt that is seen whole": _prompt_seen_whole,
    "dynamic heads": lambda plan: isinstance(plan.shape, DynamicHeadsConfig) and "dynamic heads (active_heads)",
    "new dynamic heads": _new_heads,
    "a sampler without graphs": _no_graphs,
}
FORMS = {**SITUATIONS, **MODELS}
