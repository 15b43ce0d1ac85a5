"""What a client asks for: the fields of OpenAI's API that are understood, and those that are refused by name."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    model_validator,
)

from grpo.endpoint.api_error import ApiError
from grpo.endpoint.body import SHORT
from rewards.config.json_file import parse_json, unfit
from rollout.sampling import LOWEST_TEMPERATURE

MOST_STOPS, STOP_CHARACTERS, MOST_COMPLETIONS = 16, 1000, 128
Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
ROLES = ("system", "developer", "user", "assistant", "tool")
WHOLE = "tokens are drawn from the whole distribution of the policy, as it was trained"
ONLY_SAMPLED = "only the sampled token has a log-probability here"


def _prompts(value: object) -> list[Any]:
    """A text, token ids, or a list of one of them becomes a list of prompts."""

    def is_ids(part: object) -> bool:
        return isinstance(part, list) and bool(part) and all(type(token) is int for token in part)

    prompts = [value] if is_ids(value) or isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("give a text, a list of token ids, or a list of these")
    if not all(is_ids(prompt) or (isinstance(prompt, str) and prompt) for prompt in prompts):
        raise ValueError("a prompt is a text or a list of token ids, and not empty")
    return prompts


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value or []


def _temperature(value: float | None) -> float | None:
    if value and value < LOWEST_TEMPERATURE:
        raise ValueError(f"use 0 (greedy), or {LOWEST_TEMPERATURE:g} or more")
    return value


def message_of(value: object) -> dict[str, Any]:
    """A message gets its content as one text. What else it has is passed on to the chat template."""
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise ValueError(f"a message is an object whose role is one of {', '.join(ROLES)}")
    content = value.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("content has parts of type text alone; the policy reads nothing else")
        if not all(isinstance(part.get("text"), str) for part in content):  # "None" is what nobody has written
            raise ValueError("a part of type text has a `text`, which is one")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError("content is a text")
    calls = value.get("tool_calls")
    if content is None and not calls:
        raise ValueError("content is missing")
    message = {**value, "content": content or ""}
    if calls:
        message["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [{}])]
    return message


def _call(call: Any) -> dict[str, Any]:
    """Chat templates want the arguments of a call as an object; OpenAI's clients send them as a JSON text, and some
    with fields of their own, such as `parsed_arguments`, which are left out."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('a call of a tool is {"type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):  # else it stays as a model wrote it
            value = parse_json(arguments)
            arguments = arguments if unfit(value) else value
    fields = {name: call[name] for name in ("id", "type") if name in call}
    return fields | {"function": {"name": function["name"], "arguments": arguments}}


def _tools(value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    functions = [tool.get("function") for tool in value or []]
    names = [function.get("name") if isinstance(function, dict) else None for function in functions]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError('a tool is {"type": "function", "function": {"name": ..., "parameters": ...}}')
    if len(set(names)) < len(names):
        raise ValueError(f"two tools have one name: {SHORT.repr(names)}; rename one")
    return value


class _Stream(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class Asked(BaseModel):
    """Both kinds of requests have this. With another `prompt_id`, a part of the noise's key, other tokens are drawn."""

    model_config = ConfigDict(extra="ignore", strict=True)

    # Fields that may have these values alone, and why.
    ONLY: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "top_p": ((1,), WHOLE),
        "top_k": ((-1, 0), WHOLE),
        "min_p": ((0,), WHOLE),
        "presence_penalty": ((0,), WHOLE),
        "frequency_penalty": ((0,), WHOLE),
        "repetition_penalty": ((1,), WHOLE),
        "logit_bias": (({},), WHOLE),
    }
    UNUSED: ClassVar[tuple[str, ...]] = (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    )

    model: str
    temperature: Annotated[float | None, AfterValidator(_temperature)] = Field(default=None, ge=0, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: Annotated[list[Stop], FailFast(), BeforeValidator(_stops)] = Field(default=[], max_length=MOST_STOPS)
    n: int | None = Field(default=None, ge=1, le=MOST_COMPLETIONS)
    stream: bool | None = None
    stream_options: _Stream | None = None
    return_token_ids: bool = False
    prompt_id: str | None = Field(default=None, max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _without_the_neutral(cls, request: dict[str, Any]) -> dict[str, Any]:
        for name, (allowed, why) in cls.ONLY.items():
            value = request.get(name)
            fits = isinstance(value, bool) is isinstance(allowed[0], bool) and value in allowed
            if value is not None and not fits:
                raise ApiError(f"{name}={value!r:.60}: {why}; leave it out", param=name, code="unsupported_value")
        for name in request:
            if name not in cls.model_fields and name not in cls.ONLY and name not in cls.UNUSED:
                raise ApiError(f"there is no field {name:.60}; leave it out", param=name[:60], code="unknown_parameter")
        return {name: value for name, value in request.items() if name in cls.model_fields}

    @property
    def completions(self) -> int:
        """Each prompt gets so many completions."""
        return self.n or 1

    @property
    def prompts(self) -> int:
        return 1

    @property
    def limit(self) -> int | None:
        """A completion has at most so many tokens, where the request says so."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Tells whether the answer has log-probabilities; each kind of request asks for them in its own way."""
        raise NotImplementedError


class CompletionAsked(Asked):
    """A client asks /v1/completions for this."""

    ONLY = Asked.ONLY | {
        "echo": ((False,), "a prompt is not repeated"),
        "suffix": (("",), "a policy only continues"),
        "best_of": ((1,), "every completion that is sampled is given back (see n)"),
    }

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    logprobs: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _no_others(self) -> CompletionAsked:
        if self.logprobs:
            raise ApiError(f"logprobs={self.logprobs}: {ONLY_SAMPLED}; use 0", param="logprobs")
        return self

    @property
    def prompts(self) -> int:
        return len(self.prompt)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class ChatAsked(Asked):
    """A client asks /v1/chat/completions for this. `tools` and messages are given to the chat template as they are.
    With `tool_choice: none` it shows the tools, too, and a call in the answer is text."""

    ONLY = Asked.ONLY | {
        "top_logprobs": ((0,), ONLY_SAMPLED),
        "tool_choice": (
            ("auto", "none"),
            "the policy decides whether it calls a tool; a forced call would not be drawn from its distribution",
        ),
        "response_format": (
            ({"type": "text"},),
            "a grammar would draw from another distribution than the policy's; ask for JSON in a message",
        ),
        "modalities": ((["text"],), "the policy writes text"),
    }

    messages: Annotated[list[Annotated[Any, BeforeValidator(message_of)]], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    tools: Annotated[list[dict[str, Any]] | None, FailFast(), AfterValidator(_tools)] = None
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)
