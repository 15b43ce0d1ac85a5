"""The names that options have in `quartet train`, in commands that have the same options without sections."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from grpo.config.problems import unknown_option
from grpo.config.yaml_file import ConfigError

_SECTIONS = ("data", "rollout", "eval")
_OTHERS = {"data.name": "data", "rollout.group_size": "samples", "data.split": "", "data.limit": ""}  # of training


def as_here(options: type[BaseModel], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` with `template` in place of `data.template` where `options` has no section `data`, and so on.

    Raises ConfigError for an option of `data` that there is not, or that is about what is trained on.

    >>> as_here(EvalConfig, {"data.name": "gsm8k", "rollout.temperature": 0.7})
    {'data': 'gsm8k', 'temperature': 0.7}
    """
    names, found, problems = options.model_fields, {}, []
    for key, value in overrides.items():
        section, _, last = key.partition(".")
        here = _OTHERS.get(key, last)
        if section not in _SECTIONS or not last or (section in names and _is_section(names[section].annotation)):
            found[key] = value
        elif here in names:
            found[here] = value
        elif section in names:  # a text, inside which nothing can be set
            problems.append(unknown_option(key, value, "command line", names))
        else:
            found[key] = value
    if problems:
        raise ConfigError(problems)
    return found


def _is_section(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)
