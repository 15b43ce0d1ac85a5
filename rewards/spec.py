"""A reward function of a run: how a user specifies it, and what it is sent for a batch of groups."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any

from rewards.group_score import LARGEST
from rewards.protocol import PROVIDED, Messages, RewardError, Signature
from rewards.registry import CHAT, find_reward


@dataclass(frozen=True)
class RewardSpec:
    """One reward function of a run, as plain data.

    `function` is a built-in's name or `path/to/file.py:function`; with `chat:` before it the function gets prompts and
    completions as chat messages instead of strings. `arguments` are bound to its parameters. `name` is its label in
    metrics.

    >>> RewardSpec("regex_format", weight=0.2, arguments={"pattern": "#### [0-9]+"}).label
    'regex_format'
    """

    function: str
    weight: float = 1.0
    name: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name or PurePath(self.function.rpartition(":")[2]).name

    @property
    def reads_chat(self) -> bool:
        return self.function.startswith(CHAT)


@dataclass
class Group:
    """One prompt with its completions, and what functions may ask for beside them."""

    prompt: str | Messages
    completions: list[str]
    columns: Mapping[str, Any]
    prompt_id: str
    completion_ids: list[list[int]] | None
    completion_columns: Mapping[str, Sequence[Any]]
    messages: Messages | None = None  # of the prompt
    turns: list[Messages] | None = None  # of each completion, where they are episodes

    def only(self, sample: int) -> Group:
        """The group with this completion alone."""
        ids = None if self.completion_ids is None else [self.completion_ids[sample]]
        each = {name: [values[sample]] for name, values in self.completion_columns.items()}
        turns = None if self.turns is None else [self.turns[sample]]
        texts = [self.completions[sample]]
        return replace(self, completions=texts, completion_ids=ids, completion_columns=each, turns=turns)


class RewardFunction:
    """A spec with its source and signature, which a worker needs to load it and to call it."""

    def __init__(self, spec: RewardSpec, index: int):
        self.spec, self.index, self.label = spec, index, spec.label
        self.source = find_reward(spec.function)
        self.signature = Signature((), (), False)  # known once a worker has loaded it

    def description(self) -> dict[str, Any]:
        """Gives what a worker needs to load the function."""
        content = self.source.content.decode("latin-1")
        call = {"arguments": self.spec.arguments, "chat": self.spec.reads_chat}
        return asdict(self.source) | {"content": content} | call

    def check(self, columns: Sequence[str] | None) -> None:
        """Raise RewardError, if the columns are known, for a parameter without a value."""
        if columns is not None:
            self.signature.check(repr(self.spec.function), columns, self.spec.arguments)

    def request(self, groups: Sequence[Group], trainer_state: Mapping[str, Any] | None) -> dict[str, Any]:
        """The message for a batch. Raises RewardError if something that the function asks for is missing."""
        per_completion = groups[0].completion_columns
        names = self._columns([*dict.fromkeys(name for group in groups for name in group.columns), *per_completion])
        request: dict[str, Any] = {
            "function": self.index,
            "prompts": [(group.messages if self.spec.reads_chat else None) or group.prompt for group in groups],
            "completions": [(group.turns if self.spec.reads_chat else None) or group.completions for group in groups],
            "columns": {
                name: [self._value(group, name) for group in groups] for name in names if name not in per_completion
            },
            "completion_columns": {
                name: [list(group.completion_columns[name]) for group in groups]
                for name in names
                if name in per_completion
            },
        }
        ids = [group.completion_ids for group in groups]
        for name, value in {
            "completion_ids": None if None in ids else ids,
            "trainer_state": None if trainer_state is None else dict(trainer_state),
        }.items():
            if self.signature.asks_for(name) and value is not None:
                request[name] = value
            elif name in self.signature.required:
                raise RewardError(f"reward {self.spec.function!r} asks for {name}; pass {name} to Scorer.score")
        return request

    def _columns(self, columns: Sequence[str]) -> list[str]:
        """The columns to send: those that the function names, and all others if it takes `**kwargs`."""
        signature = self.signature
        # A built-in's parameters with a default are options: it ignores a column that happens to be called `mode`.
        optional = [name for name in signature.optional if name in columns and self.source.may_read(name)]
        rest = [name for name in dict.fromkeys(columns) if signature.takes_rest and not signature.asks_for(name)]
        others = (*PROVIDED, *self.spec.arguments)
        return [name for name in (*signature.required, *optional, *rest) if name not in others]

    def _value(self, group: Group, name: str) -> object:
        if name not in group.columns and name not in self.signature.required:
            return None  # other prompts have it
        if name not in group.columns:
            where = f"{self.spec.function!r} (prompt {group.prompt_id!r})"
            self.signature.check(where, group.columns, self.spec.arguments)
            raise RewardError(f"prompt {group.prompt_id!r} has no column {name!r}, which other prompts have")
        value = group.columns[name]
        if culprit := _not_json(value):
            raise RewardError(
                f"column {name!r} of prompt {group.prompt_id!r} holds {culprit}, which cannot be sent to the reward "
                f"{self.spec.function!r}; make it strings, numbers, booleans, None, lists, or dicts with string keys"
            )
        return value


def check_specs(specs: Sequence[RewardSpec], substitute: float) -> None:
    """Raises RewardError for rewards that cannot be combined; `substitute` is the number of `on_error: score=...`."""
    if not specs:
        raise RewardError("no reward is given; name at least one, such as RewardSpec('gsm8k')")
    labels = [spec.label for spec in specs]
    for spec in specs:
        if labels.count(spec.label) > 1:
            raise RewardError(f"two rewards are called {spec.label!r}; give one of them another name")
        if not abs(spec.weight) <= LARGEST:
            raise RewardError(f"reward {spec.label!r}: weight={spec.weight!r} must be finite, and between ±{LARGEST:g}")
        if abs(spec.weight * substitute) > LARGEST:
            raise RewardError(
                f"reward.on_error='score={substitute:g}' times weight={spec.weight:g} of reward {spec.label!r} is "
                f"beyond ±{LARGEST:g}, where scores overflow; choose a smaller number"
            )
        if culprit := _not_json(spec.arguments):
            raise RewardError(f"reward {spec.label!r}: arguments hold {culprit}; use plain JSON values")


def _not_json(value: object) -> str | None:
    """The part of `value` that JSON cannot hold unchanged, in words, or None."""
    if value is None or isinstance(value, str | int | float):
        return None
    if isinstance(value, list | tuple):
        return next((culprit for item in value if (culprit := _not_json(item))), None)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"a dict with the key {key!r} of type {type(key).__name__}"
        return _not_json(list(value.values()))
    return f"a {type(value).__name__} ({json.dumps(repr(value)[:40])})"
