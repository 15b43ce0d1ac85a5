"""Calls of tools in a policy's answers, in OpenAI's form.

A call reaches the client once its completion has ended, since one that turns out bad is text. An answer in which any
call cannot be read is text as a whole, as in vLLM (vllm-project/vllm, tool_parsers/hermes_tool_parser.py): nobody runs
half of what a policy wrote. A call of a tool that was not offered is a call: frameworks have an answer of their own to
it. With `parallel_tool_calls: false` the first call is the only one, as in vLLM (`maybe_filter_parallel_tool_calls`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.endpoint.asked import ChatAsked
from rewards.config.json_file import unfit
from rollout.environments.format import BadCall, TurnFormat
from rollout.group import Completion, Prompt
from rollout.stop_strings import StopStrings

PIECE = 64  # characters of arguments in a chunk of a stream


@dataclass(frozen=True)
class Reply:
    """What a client gets of a completion: the message, and what is counted of its calls."""

    message: dict[str, Any]
    tool_calls: int = 0
    malformed_calls: int = 0  # answers whose calls could not be read
    unknown_tools: int = 0  # calls of tools that were not offered
    dropped_calls: int = 0  # after the first, where the client wants one

    @property
    def counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "message"}

    @property
    def bad(self) -> bool:
        return self.malformed_calls + self.unknown_tools > 0


class Calls:
    """Reads the answers to a request with tools of these names, which may want one call at a time, and may have stop
    texts: a call may end with one, and the text beside calls ends before it."""

    def __init__(
        self, form: TurnFormat, names: Sequence[str], parallel: bool, stops: StopStrings | None = None
    ) -> None:
        self.form, self.names, self.parallel, self.stops = form, set(names), parallel, stops

    def reply(self, prompt: Prompt, completion: Completion, index: int = 0) -> Reply:
        """The same completion of the same prompt always has the same ids of calls, so that a template that shows them
        gives the same tokens again. They have nine letters, since Mistral's templates take no others."""
        try:
            text, calls = self.form.cut(completion.token_ids)
        except BadCall:
            return Reply(text_message(completion.text), malformed_calls=1)
        if not calls or any(unfit([name, arguments]) for name, arguments in calls):
            return Reply(text_message(completion.text), malformed_calls=min(1, len(calls)))
        text = self._without_stop(text, completion)
        sent = calls if self.parallel else calls[:1]
        context = json.dumps([prompt.token_ids, completion.token_ids, index]).encode()
        tool_calls = []
        for number, (name, arguments) in enumerate(sent):
            digest = hashlib.blake2b(context, digest_size=5, salt=str(number).encode()).hexdigest()
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            tool_calls.append({"id": digest[:9], "type": "function", "function": function})
        message = text_message(text or None) | {"tool_calls": tool_calls}
        unknown = sum(name not in self.names for name, _ in sent)
        return Reply(message, len(sent), 0, unknown, len(calls) - len(sent))

    def _without_stop(self, text: str, completion: Completion) -> str:
        """Returns the text beside calls up to the stop text, with which all ends that the completion's text lacks."""
        if self.stops is None or completion.text.startswith(text):  # nothing follows the calls
            return text
        rest = str(self.stops.tokenizer.decode(completion.token_ids))[len(completion.text) :]
        if self.stops.cut(rest) == rest:
            return text
        common = next(n for n in range(len(rest), -1, -1) if text.endswith(rest[len(rest) - n :]))
        return text[: len(text) - common]

    def plain_end(self, text: str, start: int) -> int:
        """Returns up to where a growing text is surely no call, and no blank before one. It is known to `start`."""
        begins = self.form.opening.search(text, start, partial=True)
        return start + len(text[start : begins.start() if begins else len(text)].rstrip())


def text_message(content: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "refusal": None}


def deltas(tool_calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the calls as a stream has them: each begins with its id and name, and its arguments come in pieces."""
    chunks = []
    for index, call in enumerate(tool_calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        chunks.append({"index": index, **call, "function": {"name": name, "arguments": ""}})
        pieces = [arguments[i : i + PIECE] for i in range(0, len(arguments), PIECE)]
        chunks += [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    return [{"tool_calls": [chunk]} for chunk in chunks]


def calls_of(asked: ChatAsked, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> Calls | None:
    """Returns what reads the answers to a request; None where they are text."""
    form = form_of(asked, tokenizer, stops)
    if form is None or asked.tool_choice == "none":
        return None
    names = [tool["function"]["name"] for tool in asked.tools or []]
    stop_strings = StopStrings(tokenizer, asked.stop) if asked.stop else None
    return Calls(form, names, asked.parallel_tool_calls is not False, stop_strings)


def form_of(asked: ChatAsked, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> TurnFormat | None:
    """Returns the form of turns with the tools of a request: the chat template's own, or without one the marks of a
    base model. None without tools, and for a chat template that writes no calls, or in a form that nobody knows."""
    if not asked.tools:
        return None
    return _form(tokenizer, str(tokenizer.chat_template or ""), json.dumps(asked.tools), stops)


@lru_cache(16)
def _form(tokenizer: PreTrainedTokenizerBase, template: str, tools: str, stops: tuple[int, ...]) -> TurnFormat | None:
    try:
        form = TurnFormat(tokenizer, json.loads(tools), stop_token_ids=stops)
    except ValueError:
        return None
    return None if form.is_plain and template else form
