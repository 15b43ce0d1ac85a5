"""Chat templates are programs that came with a model: they run in a process with limits of time and memory."""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rewards.isolation.pool import WorkerPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMIT_S, MEMORY = 10.0, 1 << 30  # a template takes milliseconds


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    **options: object,
) -> str:
    """The text of `tokenizer.apply_chat_template(messages, tools, tokenize=False, **options)`, which is the function of
    transformers. Raises ValueError with what the template raises, or with the limit that it exceeds. A run's
    `data.chat_template_kwargs`, which its tokenizer carries, are options of every call.

    >>> render(tokenizer, [{"role": "user", "content": "2 + 3 = ?"}], add_generation_prompt=True)
    '<|user|>2 + 3 = ?<|assistant|>'
    """
    request = {
        "function": 0,
        "template": tokenizer.get_chat_template(None, tools),
        "messages": [{name: value for name, value in turn.items() if value is not None} for turn in messages],
        "tools": tools,
        "options": {**tokenizer.special_tokens_map, **getattr(tokenizer, "chat_template_kwargs", {}), **options},
    }
    [reply] = _pool().run([request])
    if reply is not None and reply.get("kind") == "died":  # perhaps by somebody's hand: the same once more
        [reply] = _pool().run([request])
    assert reply is not None
    texts = _arguments_as_text(request["messages"]) if reply.get("message", "").startswith("TypeError") else None
    if texts is not None:
        [reply] = _pool().run([request | {"messages": texts}])
        assert reply is not None
    if "kind" in reply:
        raise ValueError(reply["message"])
    return str(reply["text"])


def _arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages for a template that joins the arguments of calls to text, as DeepSeek's does; None without any."""

    def call_with_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    changed = [
        turn | {"tool_calls": [call_with_text(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]
    return None if changed == messages else changed


@cache
def _pool() -> WorkerPool:
    pool = WorkerPool([{"kind": "template", "function": "chat template"}], size=1, timeout_s=LIMIT_S, memory=MEMORY)
    atexit.register(pool.close)
    return pool
