"""One episode of an agent: what it asks, what the policy answers, and the ids of both.

A request that begins with all that a segment has said goes on with it: the ids that were sampled stay, and only what is
new is turned into ids. Any other request begins a segment. So every id that is learned from was sampled as it is, after
exactly the ids before it (contract 1).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from grpo.endpoint.api_error import ApiError
from grpo.endpoint.asked import Asked, ChatAsked, CompletionAsked, message_of
from grpo.endpoint.batcher import Batcher
from grpo.endpoint.calls import Reply, form_of, text_message
from grpo.endpoint.served import Job, Served
from rewards.episode import ToolStats
from rollout.group import Completion, DraftStats, FinishReason, Prompt, Segment
from rollout.request import News, Request
from rollout.sampling import SamplingParams

PLACE = "\ue000answer\ue000"  # stands for an answer, to find what a chat template writes after it
Said: TypeAlias = str | list[int] | list[dict[str, Any]]


@dataclass(eq=False)
class Growing:
    """A segment: its `ids` follow those of `prompt`, and `said` is both as the client knows them, with which a request
    must begin to go on. It `waits` while a request of it is answered, and for ever if the client went away before."""

    prompt: Prompt
    said: Said
    tools: list[dict[str, Any]] | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    waits: bool = True

    def add(self, read: Sequence[int], completion: Completion) -> None:
        """Append what the agent wrote, and the answer."""
        self.ids += [*read, *completion.token_ids]
        self.logprobs += [*[0.0] * len(read), *completion.logprobs]
        self.sampled += [*[False] * len(read), *[True] * len(completion.token_ids)]
        self.depths += [*[0] * len(read), *completion.draft.depths]


@dataclass(frozen=True)
class Recorded(Job):
    """`keep_completion` gets the completion before the client does. `home` is the episode's, see `Request`."""

    keep_completion: Callable[[Completion], None] = lambda completion: None
    home: int = 0

    def request(self, tell: Callable[[int, News], None]) -> Request:
        def told(news: News) -> None:
            if news.completion is not None:
                self.keep_completion(news.completion)
            tell(self.index, news)

        return Request(self.prompt, self.params, told, self.home)


class Episode(Served):
    """What an agent asks is answered by the batch, as one completion of `prompt`, the one with this `sample` index.
    `params` are those of the rollout; `temperature` is the one that a request may name. Episodes with the same `home`
    are decoded by the same worker."""

    home = 0

    def __init__(self, prompt: Prompt, sample: int, batcher: Batcher, params: SamplingParams, temperature: float):
        super().__init__("policy", batcher, params, "it learns from what it is asked here")
        self.prompt, self.sample, self.temperature = prompt, sample, temperature
        self.segments: list[Growing] = []
        self.turns: list[dict[str, Any]] = []
        self.answers: list[Completion] = []
        self.requests, self.bad_calls, self.refusal, self.ended = 0, 0, "", False
        self._lock = threading.Lock()

    def jobs(self, asked: Asked) -> list[Job]:
        """Returns the completion that is asked for. Raises ApiError for what cannot be learned from."""
        self._refuse(asked)
        asked = self._limited(asked)
        first, said = self._read(asked)
        tools = asked.tools if isinstance(asked, ChatAsked) else None
        calls = self.calls(asked)
        with self._lock:
            if self.ended:
                raise ApiError("this episode has ended", 404, code="episode_ended")
            longest = sorted(self.segments, key=lambda segment: -len(segment.said))
            known = next(((s, ids) for s in longest if (ids := self._after(s, first, said, asked)) is not None), None)
            segment, read = known or (Growing(replace(first, prompt_id=self._name(first.token_ids)), said, tools), [])
            start = len(segment.ids) + len(read)
            prompt = replace(segment.prompt, token_ids=[*segment.prompt.token_ids, *segment.ids, *read])
            param = "messages" if isinstance(asked, ChatAsked) else "prompt"
            params = replace(self._params(asked, prompt, param, self.defaults.seed), start=start)
            is_task = not known and first.token_ids == self.prompt.token_ids
            new = [] if is_task else _new(self._heard(segment if known else None, said), said)
            segment.waits = True
            if not known:
                self.segments.append(segment)

        def keep_completion(completion: Completion) -> None:
            reply = calls.reply(prompt, completion) if calls else Reply(text_message(completion.text))
            with self._lock:
                if self.ended:
                    return
                segment.add(read, completion)
                message = plain(message_of(reply.message))
                segment.said, segment.waits = _with_answer(said, completion, message), False
                self.turns += [*new, message]
                self.answers.append(completion)
                self.bad_calls += reply.bad

        return [Recorded(0, replace(prompt, first_sample=self.sample), params, keep_completion, self.home)]

    def end(self) -> None:
        """The agent has returned or failed: later requests are refused, and answers that are not there do not count."""
        with self._lock:
            self.ended = True

    def finish(self, reply: Mapping[str, Any]) -> Completion:
        """Returns the completion, given what the agent returned or why it failed."""
        self.end()
        errors = self.requests - len(self.answers)
        stats = ToolStats(self.requests, errors, self.bad_calls, reply.get("reward"))
        if "kind" in reply:
            stats.failure = {"kind": reply["kind"], "message": reply["message"]}
        elif not self.answers:
            refused = f"; its last request was refused: {self.refusal}" if self.refusal else ""
            stats.failure = {"kind": "asked_nothing", "message": f"it got no answer of the policy{refused}"}
        grown = [segment for segment in self.segments if segment.ids]
        ids = [token for segment in grown for token in segment.ids]
        begins = [Segment(sum(len(s.ids) for s in grown[:i]), s.prompt.token_ids) for i, s in enumerate(grown)]
        if [segment.prompt_token_ids for segment in begins] == [self.prompt.token_ids]:
            begins = []  # as without an agent
        reasons: list[FinishReason] = [answer.finish_reason for answer in self.answers] or ["environment"]
        reason: FinishReason = "abort" if "abort" in reasons else "environment" if stats.failure else reasons[-1]
        visible = ids[:-1] if ids and ids[-1] in self.defaults.stop_token_ids else ids
        drafts = sum((answer.draft for answer in self.answers), DraftStats())
        return Completion(
            token_ids=ids,
            logprobs=[value for segment in grown for value in segment.logprobs],
            text=str(self.tokenizer.decode(visible)),
            finish_reason=reason,
            policy_version=self.batcher.engine.version,
            draft=replace(drafts, depths=[depth for segment in grown for depth in segment.depths]),
            turns=self.turns,
            sampled=[flag for segment in grown for flag in segment.sampled],
            tools=stats,
            segments=begins,
            cached=sum(answer.cached for answer in self.answers),
            temperature=self.temperature,
        )

    # ---- what a request says ------------------------------------------------------------------------------------

    def _refuse(self, asked: Asked) -> None:
        """Raises ApiError for what would not be learned from as it was sampled."""
        other, ours = asked.temperature, self.temperature
        wrong = {
            "temperature": other not in (None, ours) and f"{other:g}: the run learns at {ours:g} (rollout.temperature)",
            "n": asked.completions > 1 and f"{asked.n}: an episode has one line of answers; ask again for another one",
            "seed": asked.seed is not None and f"{asked.seed}: the noise is the run's, and another one at every step",
            "prompt_id": asked.prompt_id is not None and f"{asked.prompt_id!r:.60}: the noise is the run's",
            "stop": bool(asked.stop) and f"{asked.stop!r:.60}: the tokens that complete it would be learned from, too",
        }
        if isinstance(asked, CompletionAsked) and len(asked.prompt) > 1:
            wrong["prompt"] = "[...]: several prompts in one request; send them one by one"
        for name, why in wrong.items():
            if why:
                out = "" if name == "prompt" else "; leave it out"
                raise ApiError(f"{name}={why}{out}", param=name, code="unsupported_value")

    def _limited(self, asked: Asked) -> Asked:
        """Returns the request with the temperature of the rollout and at most its tokens."""
        limit = None if asked.limit is None else min(asked.limit, self.defaults.max_completion_tokens)
        limits = {"max_tokens": limit} | ({"max_completion_tokens": limit} if isinstance(asked, ChatAsked) else {})
        return asked.model_copy(update=limits | {"temperature": None})

    def _read(self, asked: Asked) -> tuple[Prompt, Said]:
        """Returns the whole request as a prompt, and as the client says it."""
        if isinstance(asked, ChatAsked):
            return self._chat(asked), [plain(message) for message in asked.messages]
        assert isinstance(asked, CompletionAsked)
        [text] = asked.prompt
        if text == self.prompt.text:  # whose tokens may be others: a chat template has written the first one already
            return Prompt("", text, self.prompt.token_ids), text
        return self._prompt(text, ""), text

    def _heard(self, segment: Growing | None, said: Said) -> Said | None:
        """Returns what was said before in the segment with which a request goes on."""
        return segment.said if segment else None

    def _after(self, segment: Growing, first: Prompt, said: Said, asked: Asked) -> list[int] | None:
        """Returns the ids of what a request says after all that the segment has said; None where it says otherwise. The
        whole request is `first`."""
        known, tools = segment.said, asked.tools if isinstance(asked, ChatAsked) else None
        if segment.waits or type(known) is not type(said) or said[: len(known)] != known or tools != segment.tools:
            return None
        if isinstance(said, str):
            return self.tokenizer.encode(said[len(known) :], add_special_tokens=False)
        new: list[Any] = list(said[len(known) :])
        if not isinstance(known[-1], dict):  # ids
            return new
        form = form_of(asked, self.tokenizer, self.defaults.stop_token_ids) if isinstance(asked, ChatAsked) else None
        if form is not None and form.is_plain:
            if known[-1].get("tool_calls"):
                return self.tokenizer.encode(form.lines(new), add_special_tokens=False)
            ids, stops = (
                self.tokenizer.encode(f"\n{form.lines(new)}", add_special_tokens=False),
                self.defaults.stop_token_ids,
            )
            return ids if {*segment.ids[-1:]} & {*stops} else [*stops[:1], *ids]
        if form is not None and known[-1].get("tool_calls"):
            try:
                return form.after(segment.ids, known[-1]["tool_calls"], new)
            except ValueError:
                return None
        messages: list[Any] = [*known[:-1], {**known[-1], "content": PLACE}, *new]
        _, *after = self._by_template(messages, tools).split(PLACE)
        if len(after) != 1:  # the template shows the answer elsewhere, or not at all
            return None
        ids = self.tokenizer.encode(after[0], add_special_tokens=False)
        stops = self.defaults.stop_token_ids
        ends_twice = bool(ids) and segment.ids[-1] in stops and ids[0] in stops
        return ids[1:] if ends_twice else ids

    def _name(self, ids: list[int]) -> str:
        """Returns the key of a segment's noise. For the prompt of the data it is that of the completion without an
        agent. Else it tells the prompt, and how often the episode has asked it, so that requests may come in any
        order."""
        before = sum(segment.prompt.token_ids == ids for segment in self.segments)
        if not before and ids == self.prompt.token_ids:
            return self.prompt.prompt_id
        digest = hashlib.blake2b(json.dumps(ids).encode(), digest_size=12).hexdigest()
        return f"{self.prompt.prompt_id}/{digest}/{before}"


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drops fields that say nothing, such as `refusal: null`, with which clients send an answer back."""
    return {
        name: value for name, value in message.items() if name in ("role", "content") or value not in (None, [], {})
    }


def _with_answer(said: Said, completion: Completion, message: dict[str, Any]) -> Said:
    if isinstance(said, str):
        return said + completion.text
    return [*said, message] if isinstance(said[0], dict) else [*said, *completion.token_ids]


def _new(known: Said | None, said: Said) -> list[dict[str, Any]]:
    """Returns what a request says after what is known, as messages; what was said in ids has no text. An answer in it
    is not one of the policy, or not as it was given: it is a part of the prompt."""
    rest = said[len(known or "") :]
    if isinstance(rest, str):
        return [{"role": "user", "content": rest}] if rest else []
    return [message for message in rest if isinstance(message, dict) and message["role"] != "assistant"]
