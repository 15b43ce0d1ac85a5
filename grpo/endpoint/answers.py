"""What a client gets: completions and chunks in OpenAI's form."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from grpo.endpoint.asked import Asked, ChatAsked
from grpo.endpoint.served import Job, Served
from grpo.endpoint.text_stream import TextStream
from rollout.group import Completion
from rollout.serving import News


class Answer:
    """One request and what has become of it. Every answer says which version of the policy it is from, `seed`, and
    whether drafts were verified (`accept`)."""

    def __init__(self, served: Served, asked: Asked, jobs: Sequence[Job]) -> None:
        self.served, self.asked, self.jobs = served, asked, jobs
        self.is_chat, self.tokenizer = isinstance(asked, ChatAsked), served.tokenizer
        self.stops = set(served.defaults.stop_token_ids)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.done: dict[int, Completion] = {}
        self.opened: set[int] = set()  # choices of a chat whose first chunk was made
        self.streams = {job.index: TextStream(self.tokenizer, job.params.stop_strings) for job in jobs}

    @property
    def ended(self) -> bool:
        return len(self.done) == len(self.jobs)

    def whole(self) -> dict[str, Any]:
        """The answer without streaming."""
        choices = [self._choice(job) for job in self.jobs]
        return self._frame("chat.completion" if self.is_chat else "text_completion", choices, self._version()) | {
            "usage": self.usage()
        }

    def pieces(self, index: int, news: News) -> list[dict[str, Any]]:
        """The chunks of one round of one completion."""
        stream, completion, chunks = self.streams[index], news.completion, []
        if completion is None:
            text = stream.add(news.token_ids)
        else:  # its last tokens may complete a stop text, or be a stop token
            self.done[index] = completion
            text = stream.finish(completion.text)
        ids, logprobs = self._without_stop(news.token_ids, news.logprobs)
        scored = self._logprobs(ids, logprobs) if self.asked.wants_logprobs and ids else None
        if self.is_chat and index not in self.opened:
            self.opened.add(index)
            start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            chunks.append(self._chunk([{"index": index, **start}], news.version))
        if text or scored:
            said: dict[str, Any] = {"delta": {"content": text}} if self.is_chat else {"text": text}
            chunks.append(
                self._chunk([{"index": index, **said, "logprobs": scored, "finish_reason": None}], news.version)
            )
        if completion is not None:
            said = {"delta": {}} if self.is_chat else {"text": ""}
            end = {"index": index, **said, "logprobs": None, "finish_reason": completion.finish_reason}
            chunks.append(self._chunk([end | self._ids(index, completion)], news.version))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """The chunk after the last token, for clients that want the usage."""
        options = self.asked.stream_options
        wanted = options is not None and options.include_usage
        return [self._chunk([], self._version()) | {"usage": self.usage()}] if wanted else []

    def usage(self) -> dict[str, Any]:
        prompts = {id(job.params): len(job.prompt.token_ids) for job in self.jobs}  # those of one prompt share it
        prompt, completion = sum(prompts.values()), sum(len(done.token_ids) for done in self.done.values())
        accepted = sum(sum(done.draft.accepted) for done in self.done.values())
        drafted = sum(sum(done.draft.drafted) for done in self.done.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
            "target_forwards": sum(done.draft.target_forwards for done in self.done.values()),
            "fallbacks": sum(done.draft.fallbacks for done in self.done.values()),
        }

    def _version(self) -> int:
        """The newest one, where a newer policy was loaded between the choices; each of them names its own."""
        return max(done.policy_version for done in self.done.values())

    def _frame(self, kind: str, choices: list[dict[str, Any]], version: int) -> dict[str, Any]:
        accept = self.served.defaults.accept
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
            "system_fingerprint": f"policy-version-{version}-{accept}",
            "policy_version": version,
            "seed": self.jobs[0].params.seed,
            "accept": accept,
        }

    def _chunk(self, choices: list[dict[str, Any]], version: int) -> dict[str, Any]:
        return self._frame("chat.completion.chunk" if self.is_chat else "text_completion", choices, version)

    def _choice(self, job: Job) -> dict[str, Any]:
        completion = self.done[job.index]
        message = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        said: Mapping[str, Any] = message if self.is_chat else {"text": completion.text}
        scored = None
        if self.asked.wants_logprobs:
            scored = self._logprobs(*self._without_stop(completion.token_ids, completion.logprobs))
        reason = {"finish_reason": completion.finish_reason}
        return {"index": job.index, **said, "logprobs": scored, **reason} | self._ids(job.index, completion)

    def _ids(self, index: int, completion: Completion) -> dict[str, Any]:
        own = {"policy_version": completion.policy_version}
        if not self.asked.return_token_ids:
            return own
        return own | {"token_ids": completion.token_ids, "prompt_token_ids": self.jobs[index].prompt.token_ids}

    def _without_stop(self, ids: list[int], logprobs: list[float]) -> tuple[list[int], list[float]]:
        """A stop token is no part of the text."""
        kept = len(ids) - bool(ids and ids[-1] in self.stops)
        return ids[:kept], logprobs[:kept]

    def _logprobs(self, ids: list[int], logprobs: list[float]) -> dict[str, Any]:
        texts = [str(self.tokenizer.decode([token])) for token in ids]
        if self.is_chat:
            content = [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in zip(texts, logprobs, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = list(accumulate(map(len, texts[:-1]), initial=0)) if texts else []
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def event(content: Mapping[str, Any] | str) -> bytes:
    """One event of a stream.

    >>> event({"a": 1}), event("[DONE]")
    (b'data: {"a": 1}\\n\\n', b'data: [DONE]\\n\\n')
    """
    text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
    return f"data: {text}\n\n".encode()
