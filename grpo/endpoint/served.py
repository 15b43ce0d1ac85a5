"""What is served: a policy with its tokenizer, and how a request becomes prompts and parameters of the sampler."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.prompts import PromptTemplate, apply_chat_template, encode_prompt
from grpo.endpoint.api_error import ApiError
from grpo.endpoint.asked import Asked, ChatAsked, CompletionAsked
from grpo.endpoint.batcher import Batcher
from grpo.endpoint.calls import Calls, calls_of, form_of
from policies.attention import sees_prompts_whole
from rewards.data.examples import Example, beyond_context
from rollout.faults import RolloutError
from rollout.group import Prompt
from rollout.request import News, Request
from rollout.sampling import SamplingParams

WRITTEN = ("assistant", "tool")  # by roles: what a conversation holds after its first prompt
AS_IT_IS = PromptTemplate("{prompt}")


@dataclass(frozen=True)
class Job:
    """One completion is asked for, and has this place among the choices."""

    index: int
    prompt: Prompt
    params: SamplingParams

    def request(self, tell: Callable[[int, News], None]) -> Request:
        return Request(self.prompt, self.params, lambda news: tell(self.index, news))


@cache
def _say_what_becomes_of_tools(shown: bool) -> None:
    """Says it once: a client that waits for `tool_calls` would take the answer for one without calls."""
    template = "shows them to the policy" if shown else "does not show them to the policy"
    calls = "no form of calls is known for it, so calls in an answer stay text, as the policy wrote them"
    print(f"a request has tools: the chat template {template}, and {calls}", file=sys.stderr, flush=True)


class Served:
    """A policy is served under a name. `defaults` hold for what a request does not say. `meaning` says what the policy
    is, such as "the newest checkpoint; the run has not ended"."""

    def __init__(self, name: str, batcher: Batcher, defaults: SamplingParams, meaning: str) -> None:
        self.name, self.batcher, self.defaults, self.meaning = name, batcher, defaults, meaning

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.batcher.engine.policy.tokenizer

    @property
    def context(self) -> int:
        engine = self.batcher.engine
        return getattr(engine, "context", engine.policy.max_length)  # that of vLLM may be shorter

    def jobs(self, asked: Asked) -> list[Job]:
        """Returns the completions of a request. Raises ApiError for what cannot be sampled."""
        if asked.model != self.name:
            message = f"the model {asked.model!r:.60} does not exist; here it is {self.name!r}"
            raise ApiError(message, 404, param="model", code="model_not_found")
        most, count = self.batcher.most_waiting, asked.prompts * asked.completions
        if count > most:
            raise ApiError(f"{count} completions in one request; ask for at most {most}", param="n")
        prompts, param = [], "prompt"
        if isinstance(asked, ChatAsked):
            prompts, param = [self._chat(asked)], "messages"
        elif isinstance(asked, CompletionAsked):
            prompts = [self._prompt(text, asked.prompt_id or "") for text in asked.prompt]
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        jobs: list[Job] = []
        for number, prompt in enumerate(prompts):
            params = self._params(asked, prompt, param, seed)
            before = sum(other.token_ids == prompt.token_ids for other in prompts[:number])
            first = asked.completions * before  # the same prompt again has noise of its own, also as a text and as ids
            samples = [replace(prompt, first_sample=first + sample) for sample in range(asked.completions)]
            jobs += [Job(number, each, params) for number, each in enumerate(samples, start=len(jobs))]
        return jobs

    def calls(self, asked: Asked) -> Calls | None:
        """Returns what reads the calls in the answers to a request; None where they are text."""
        stops = self.defaults.stop_token_ids
        return calls_of(asked, self.tokenizer, stops) if isinstance(asked, ChatAsked) else None

    def _params(self, asked: Asked, prompt: Prompt, param: str, seed: int) -> SamplingParams:
        room, limit = self.context - len(prompt.token_ids), asked.limit
        if room < (limit or 1):
            raise ApiError(
                f"the context is {self.context} tokens: the prompt has {len(prompt.token_ids)}, and the completion may "
                f"have {limit or 1}; shorten one of them",
                param=param,
                code="context_length_exceeded",
            )
        params = replace(
            self.defaults,
            temperature=self.defaults.temperature if asked.temperature is None else asked.temperature,
            max_completion_tokens=limit or min(self.defaults.max_completion_tokens, room),
            stop_strings=tuple(asked.stop),
            seed=seed,
        )
        try:
            self.batcher.engine.check([prompt], params)
        except (RolloutError, ValueError) as error:
            raise ApiError(str(error), param=param, code="invalid_value") from None
        return params

    def _prompt(self, text: str | list[int], prompt_id: str) -> Prompt:
        if not isinstance(text, str):
            return Prompt(prompt_id, "", text)
        self._refuse_long(text, "prompt")
        try:
            return encode_prompt(Example(prompt_id, text, "", {"prompt": text}), self.tokenizer, AS_IT_IS)
        except ValueError as error:
            raise ApiError(str(error), param="prompt", code="invalid_value") from None

    def _chat(self, asked: ChatAsked) -> Prompt:
        if not (self.tokenizer.chat_template or asked.tools):
            message = "the policy has no chat template; use /v1/completions, with the prompt as the policy knows it"
            raise ApiError(message, param="messages", code="no_chat_template")
        if sees_prompts_whole(self.batcher.engine.policy.config) and any(m["role"] in WRITTEN for m in asked.messages):
            raise ApiError(
                "this policy sees a prompt whole (prompt_attention=bidirectional), and what it has written "
                "would be a part of it; send the first turn alone, or to /v1/completions what it shall see whole",
                param="messages",
                code="prompt_seen_whole",
            )
        self._refuse_long(json.dumps(asked.messages, ensure_ascii=False), "messages")
        self._refuse_long(json.dumps(asked.tools or [], ensure_ascii=False), "tools")
        form = form_of(asked, self.tokenizer, self.defaults.stop_token_ids)
        if asked.tools and form is None:
            _say_what_becomes_of_tools("tools" in str(self.tokenizer.chat_template))
        try:
            if form is not None and form.is_plain:
                text = form.lines(asked.messages)
            else:
                text = self._by_template(asked.messages, asked.tools)
        except ValueError as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from None
        self._refuse_long(text, "messages")
        by_lines = form is not None and form.is_plain
        ids = self.tokenizer.encode(text, add_special_tokens=by_lines)
        ids = ids[:-1] if by_lines and ids[-1:] == [self.tokenizer.eos_token_id] else ids
        return Prompt(asked.prompt_id or "", text, ids, messages=asked.messages)

    def _by_template(self, messages: list[Any], tools: list[dict[str, Any]] | None) -> str:
        """Returns what the chat template makes of messages. Raises ValueError for those that it refuses."""
        options: dict[str, Any] = {"add_generation_prompt": True} | ({"tools": tools} if tools else {})
        return str(apply_chat_template(self.tokenizer, messages, tokenize=False, **options))

    def _refuse_long(self, text: str, param: str) -> None:
        """Refuse a text before it is tokenised, which takes a second for a megabyte."""
        if fault := beyond_context(text, self.context):
            raise ApiError(f"{param} {fault}; shorten it", param=param, code="context_length_exceeded")
