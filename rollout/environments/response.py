"""How a model writes calls of tools: its tokenizer, TRL or the marks in its chat template say so."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from rewards.isolation.chat_template import render

# For a chat template that cannot be asked without any tool.
_TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"properties": {}}}}


def with_tools_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or where it has several chat templates (Hermes 3, Command R), a copy that has the one for tools
    alone. Raises ValueError where there is neither that one nor a default."""
    if not isinstance(tokenizer.chat_template, dict):
        return tokenizer
    chosen = copy(tokenizer)
    chosen.chat_template = tokenizer.get_chat_template(None, tools=[_TOOL])
    return chosen


def response_template(tokenizer: PreTrainedTokenizerBase, needs_tools: bool = False) -> dict[str, Any] | None:
    """Finds how the model writes calls: its tokenizer says so, TRL knows its chat template, or the template has the
    marks of a family of models. None: it writes none. `needs_tools`: the template is always given tools."""
    if not tokenizer.chat_template:
        return None
    if template := getattr(tokenizer, "response_template", None):
        return template
    return _known(tokenizer, str(tokenizer.chat_template), needs_tools)


@lru_cache(8)
def _known(tokenizer: PreTrainedTokenizerBase, chat_template: str, needs_tools: bool) -> dict[str, Any] | None:
    from trl.chat_template_utils import add_response_schema, supports_tool_calling

    from rollout.environments.families import template_of

    limited = _Limited(tokenizer, [_TOOL] if needs_tools else None)
    try:
        if not supports_tool_calling(limited) or "tools" not in chat_template:
            return None
    except ValueError:  # the template raises something else than TRL expects, or exceeds a limit
        return None
    try:
        return add_response_schema(deepcopy(tokenizer)).response_template
    except ValueError as error:
        if family := template_of(chat_template):
            return family
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} writes calls of tools, but neither the tokenizer nor TRL "
            "says how to parse them; put response_template into tokenizer_config.json, or use the plain form"
        ) from error


class _Limited:
    """A tokenizer for TRL whose template runs in a process with limits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] | None) -> None:
        self._tokenizer, self._tools, self.chat_template = tokenizer, tools, tokenizer.chat_template

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **_: object) -> str:
        try:
            return render(self._tokenizer, messages, self._tools)
        except ValueError as error:
            if str(error).startswith("TypeError"):  # TRL asks such a template in another way
                raise TypeError(str(error)) from error
            raise
