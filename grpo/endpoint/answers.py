"""Completions and chunks in OpenAI's form: what a client gets."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from grpo.endpoint.asked import Asked, ChatAsked
from grpo.endpoint.calls import Reply, deltas, text_message
from grpo.endpoint.served import Job, Served
from grpo.endpoint.text_stream import TextStream, bytes_of_token
from rollout.group import Completion
from rollout.request import News


class Answer:
    """One request gets this answer. It says which version of the policy it is from, `seed`, and whether drafts were
    verified (`accept`)."""

    def __init__(self, served: Served, asked: Asked, jobs: Sequence[Job]) -> None:
        self.served, self.asked, self.jobs = served, asked, jobs
        self.is_chat, self.tokenizer = isinstance(asked, ChatAsked), served.tokenizer
        self.stops = set(served.defaults.stop_token_ids)
        self.offsets: Counter[int] = Counter()  # characters of each choice of which log-probabilities were told
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.done: dict[int, Completion] = {}
        self.opened: set[int] = set()  # choices of a chat whose first chunk was made
        self.calls = served.calls(asked)
        end = self.calls.plain_end if self.calls else None
        self.streams = {job.index: TextStream(self.tokenizer, job.params.stop_strings, end) for job in jobs}

    @property
    def ended(self) -> bool:
        return len(self.done) == len(self.jobs)

    def whole(self) -> dict[str, Any]:
        """Returns the answer without streaming."""
        choices = [self._choice(job) for job in self.jobs]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._frame(kind, choices, self._version()) | {"usage": self.usage()}

    def pieces(self, index: int, news: News) -> list[dict[str, Any]]:
        """Returns the chunks of one round of one completion."""
        stream, completion, chunks = self.streams[index], news.completion, []
        if completion is None:
            text = stream.add(news.token_ids)
        else:  # its last tokens may complete a stop text, or be a stop token
            self.done[index] = completion
            reply = self._reply(index, completion)
            text = stream.finish(reply.message["content"] or "")
        ids, logprobs = self._without_stop(news.token_ids, news.logprobs)
        scored = self._logprobs(ids, logprobs, index) if self.asked.wants_logprobs and ids else None

        def add(delta: dict[str, Any], logprobs: object = None, reason: str | None = None, **ids: object) -> None:
            content = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
            choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason, **ids}
            chunks.append(self._chunk([choice], news.version))

        if self.is_chat and index not in self.opened:
            self.opened.add(index)
            add({"role": "assistant", "content": ""})
        if text or scored:
            add({"content": text}, scored)
        if completion is not None:
            for delta in deltas(reply.message.get("tool_calls") or []):
                add(delta)
            add({}, None, self._reason(completion, reply), **self._ids(index, completion))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """Returns the chunk after the last token, for clients that want the usage."""
        options = self.asked.stream_options
        if options is None or not options.include_usage:
            return []
        return [self._chunk([], self._version()) | {"usage": self.usage()}]

    def usage(self) -> dict[str, Any]:
        prompts = {id(job.params): len(job.prompt.token_ids) for job in self.jobs}  # those of one prompt share it
        completions = list(self.done.values())
        prompt, completion = sum(prompts.values()), sum(len(done.token_ids) for done in completions)
        accepted = sum(sum(done.draft.accepted) for done in completions)
        drafted = sum(sum(done.draft.drafted) for done in completions)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
            "target_forwards": sum(done.draft.target_forwards for done in completions),
            "fallbacks": sum(done.draft.fallbacks for done in completions),
        }

    def _version(self) -> int:
        """Returns the newest version: a newer policy may come between the choices, and each names its own."""
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
        reply = self._reply(job.index, completion)
        content: dict[str, Any] = {"message": reply.message} if self.is_chat else {"text": completion.text}
        scored = None
        if self.asked.wants_logprobs:
            scored = self._logprobs(*self._without_stop(completion.token_ids, completion.logprobs), job.index)
        end = {"logprobs": scored, "finish_reason": self._reason(completion, reply)}
        return {"index": job.index, **content, **end, **self._ids(job.index, completion)}

    def _reply(self, index: int, completion: Completion) -> Reply:
        if self.calls is None:
            return Reply(text_message(completion.text))
        reply = self.calls.reply(self.jobs[index].prompt, completion, index)
        self.served.batcher.add_counts(reply.counts)
        return reply

    def _reason(self, completion: Completion, reply: Reply) -> str:
        return "tool_calls" if reply.tool_calls else completion.finish_reason

    def _ids(self, index: int, completion: Completion) -> dict[str, Any]:
        ids: dict[str, Any] = {"policy_version": completion.policy_version}
        if self.asked.return_token_ids:
            ids |= {"token_ids": completion.token_ids, "prompt_token_ids": self.jobs[index].prompt.token_ids}
        return ids

    def _without_stop(self, ids: list[int], logprobs: list[float]) -> tuple[list[int], list[float]]:
        """A stop token is no part of the text."""
        length = len(ids) - bool(ids and ids[-1] in self.stops)
        return ids[:length], logprobs[:length]

    def _logprobs(self, ids: list[int], logprobs: list[float], index: int) -> dict[str, Any]:
        texts = [str(self.tokenizer.decode([token])) for token in ids]
        if self.is_chat:
            content = []
            for token, text, logprob in zip(ids, texts, logprobs, strict=True):
                written = bytes_of_token(self.tokenizer, token, text)
                content.append({"token": text, "logprob": logprob, "bytes": written, "top_logprobs": []})
            return {"content": content, "refusal": None}
        offsets = list(accumulate(map(len, texts), initial=self.offsets[index]))
        self.offsets[index] = offsets.pop()
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def event(content: dict[str, Any] | str) -> bytes:
    """Returns one event of a stream.

    >>> event({"a": 1}), event("[DONE]")
    (b'data: {"a": 1}\\n\\n', b'data: [DONE]\\n\\n')
    """
    text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
    return f"data: {text}\n\n".encode()
