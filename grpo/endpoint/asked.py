"""What a client asks for: the fields of OpenAI's API that are understood, and those that are refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from grpo.config.json_file import parse_json, unfit
from grpo.endpoint.api_error import ApiError
from rollout.sampling import LOWEST_TEMPERATURE

MOST_STOPS, STOP_CHARACTERS, MOST_COMPLETIONS = 16, 1000, 128
ROLES = ("system", "developer", "user", "assistant", "tool")
WHOLE = "tokens are drawn from the whole distribution of the policy, as it was trained"
SAMPLED_ALONE = "only the sampled token has a log-probability here"
SHORT = reprlib.Repr()  # of a value that may have a million parts
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 60, 60

Kind = TypeVar("Kind", bound="Asked")


def _prompts(given: Any) -> list[Any]:
    """A text, token ids, or a list of one of them: always as a list of prompts."""
    ids = isinstance(given, list) and bool(given) and all(type(token) is int for token in given)
    prompts = [given] if ids or isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("give a text, a list of token ids, or a list of these")
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
        if not is_ids and not (isinstance(prompt, str) and prompt):
            raise ValueError("a prompt is a text or a list of token ids, and not empty")
    return prompts


def _stops(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("give a text or a list of texts, none of them empty")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"give at most {MOST_STOPS} texts")
    if any(len(stop) > STOP_CHARACTERS for stop in stops):
        raise ValueError(f"give texts of at most {STOP_CHARACTERS:,} characters")
    return stops


def _temperature(given: float | None) -> float | None:
    if given and given < LOWEST_TEMPERATURE:
        raise ValueError(f"use 0 (greedy), or {LOWEST_TEMPERATURE:g} or more")
    return given


def _message(given: Any) -> dict[str, Any]:
    """A message with its content as one text. What else it has is passed on to the chat template."""
    if not isinstance(given, dict) or given.get("role") not in ROLES:
        raise ValueError(f"a message is an object whose role is one of {', '.join(ROLES)}")
    content = given.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("content has parts of type text alone; the policy reads nothing else")
        content = "".join(str(part.get("text", "")) for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError("content is a text")
    if content is None and not given.get("tool_calls"):
        raise ValueError("content is missing")
    return {**given, "content": content or ""} | _calls(given)


def _calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Chat templates want the arguments of a call as an object; OpenAI's clients send them as a JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return {}
    read = []
    for call in calls if isinstance(calls, list) else [{}]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('a call of a tool is {"type": "function", "function": {"name": ..., "arguments": ...}}')
        arguments = function.get("arguments")
        read.append({**call, "function": {**function, "arguments": _object(arguments)}})
    return {"tool_calls": read}


def _object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = parse_json(arguments)
    except ValueError:
        return arguments  # as a model wrote it
    return arguments if unfit(value) else value


class _Stream(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of requests have. `prompt_id` is a part of the noise's key: with another one, or another seed,
    other tokens are drawn."""

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
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
    )

    model: str
    temperature: Annotated[float | None, AfterValidator(_temperature)] = Field(default=None, ge=0, allow_inf_nan=False)
    seed: int | None = None
    stop: Annotated[Any, AfterValidator(_stops)] = []
    n: int | None = Field(default=None, ge=1, le=MOST_COMPLETIONS)
    stream: bool | None = None
    stream_options: _Stream | None = None
    return_token_ids: bool = False
    prompt_id: str | None = Field(default=None, max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _without_the_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("a request is a JSON object")
        for name, (allowed, why) in cls.ONLY.items():
            value = given.get(name)
            if value is not None and (
                isinstance(value, bool) is not isinstance(allowed[0], bool) or value not in allowed
            ):
                raise ApiError(f"{name}={value!r:.60}: {why}; leave it out", param=name, code="unsupported_value")
        for name in given:
            if name not in cls.model_fields and name not in cls.ONLY and name not in cls.UNUSED:
                raise ApiError(f"there is no field {name:.60}; leave it out", param=name[:60], code="unknown_parameter")
        return {name: value for name, value in given.items() if name in cls.model_fields}

    @property
    def completions(self) -> int:
        """Completions of each prompt."""
        return self.n or 1

    @property
    def prompts(self) -> int:
        return 1

    @property
    def limit(self) -> int | None:
        raise NotImplementedError

    @property
    def wants_logprobs(self) -> bool:
        raise NotImplementedError


class CompletionAsked(Asked):
    """A request to /v1/completions."""

    ONLY = Asked.ONLY | {
        "echo": ((False,), "a prompt is not repeated"),
        "suffix": (("",), "a policy only continues"),
        "best_of": ((1,), "every completion that is sampled is given back (see n)"),
    }

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _no_others(self) -> CompletionAsked:
        if self.logprobs:
            raise ApiError(f"logprobs={self.logprobs}: {SAMPLED_ALONE}; use 0", param="logprobs")
        return self

    @property
    def prompts(self) -> int:
        return len(self.prompt)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class ChatAsked(Asked):
    """A request to /v1/chat/completions. `tools` and messages are given to the chat template as they are."""

    ONLY = Asked.ONLY | {
        "top_logprobs": ((0,), SAMPLED_ALONE),
        "tool_choice": (("auto", "none"), "the policy decides whether it calls a tool"),
        "response_format": (({"type": "text"},), "no form is enforced"),
        "modalities": ((["text"],), "the policy writes text"),
    }
    UNUSED = (*Asked.UNUSED, "parallel_tool_calls")

    messages: Annotated[list[Annotated[Any, BeforeValidator(_message)]], FailFast()] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    tools: Annotated[list[dict[str, Any]] | None, FailFast()] = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


def read(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body. Raises ApiError, which names the field and what would work."""
    try:
        given = parse_json(body)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(f"the body is a JSON {type(given).__name__}; send an object", code="invalid_json")
    if fault := unfit(given):
        raise ApiError(f"the body {fault}", code="invalid_value")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _api_error(error) from None


def _api_error(error: ValidationError) -> ApiError:
    """The first fault."""
    fault = error.errors(include_url=False)[0]
    place = [str(part) for part in fault["loc"]]
    param = ".".join(place) or None
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
    return ApiError(f"{param}={SHORT.repr(fault['input'])}: {message}", param=param, code="invalid_value")
