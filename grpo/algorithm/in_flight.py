"""Groups that were sampled and not learned from yet, as the JSON of a checkpoint takes them (contract 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.dynamic_sampling import Drawn
from rewards.episode import ToolStats
from rewards.group_score import GroupScore, RewardFailure
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup, Segment

BY_ENVIRONMENT = ("text", "token_ids", "messages")  # parts of a prompt to which an environment may have added
NOT_FINITE = "not finite"
PromptOf = Callable[[str], Prompt]


def plain(value: Any) -> Any:
    """Dataclasses, tensors of integers and what JSON knows, as JSON takes it; of a prompt what is not in the data. A
    number that is not finite, such as a reward may log, is `{NOT_FINITE: "nan"}`."""
    if isinstance(value, RolloutGroup):
        return {
            "prompt_id": value.prompt.prompt_id,
            "prompt": {name: getattr(value.prompt, name) for name in BY_ENVIRONMENT},
            "completions": plain(value.completions),
            "prompt_routing": plain(value.prompt_routing),
        }
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "numbers": value.tolist()}
    if isinstance(value, float) and not math.isfinite(value):
        return {NOT_FINITE: str(value)}
    if isinstance(value, list | tuple):
        numbers = bool(value) and all(isinstance(entry, int | float) for entry in value)  # of tokens: they are many
        return list(value) if numbers and all(map(math.isfinite, value)) else [plain(entry) for entry in value]
    return {key: plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def group_of(record: Mapping[str, Any], prompt_of: PromptOf) -> RolloutGroup:
    """The inverse of `plain` for a group; `prompt_of` gives the prompt of an id."""
    prompt = replace(prompt_of(record["prompt_id"]), **record["prompt"])
    return RolloutGroup(prompt, list(map(_completion, record["completions"])), _tensor(record["prompt_routing"]))


def drawn_of(record: Mapping[str, Any], prompt_of: PromptOf) -> Drawn:
    """The inverse of `plain` for what a step has drawn."""
    record = _numbers(record)
    made = {
        "groups": [group_of(each, prompt_of) for each in record["groups"]],
        "scores": [_score(each) for each in record["scores"]],
        "replaced": [(group_of(one, prompt_of), _score(other)) for one, other in record["replaced"]],
    }
    return Drawn(**{**record, **made})


def _completion(record: Mapping[str, Any]) -> Completion:
    tools = None if record["tools"] is None else ToolStats(**record["tools"])
    draft = {field.name: record["draft"][field.name] for field in fields(DraftStats) if field.name in record["draft"]}
    parts = {"draft": DraftStats(**draft), "routing": _tensor(record["routing"]), "tools": tools}
    segments = [Segment(**segment) for segment in record.get("segments", [])]
    return Completion(**{**record, **parts, "segments": segments})


def _score(record: Mapping[str, Any]) -> GroupScore:
    return GroupScore(**{**record, "errors": [RewardFailure(**error) for error in record["errors"]]})


def _numbers(value: object) -> Any:
    """The record with the numbers that are not finite."""
    if isinstance(value, dict):
        found = value.get(NOT_FINITE) if len(value) == 1 else None
        return {key: _numbers(entry) for key, entry in value.items()} if found is None else float(found)
    if not isinstance(value, list) or not any(isinstance(entry, dict | list) for entry in value):  # one for each token
        return value
    return [_numbers(entry) for entry in value]


def _tensor(record: Mapping[str, Any] | None) -> Tensor | None:
    return None if record is None else torch.tensor(record["numbers"], dtype=getattr(torch, record["dtype"]))
