"""Episodes of agents where the chat template rewrites earlier answers: each comes after what a server would show."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

from grpo.endpoint.asked import Asked, ChatAsked
from grpo.endpoint.episode import Episode, Growing, Recorded, Said, plain
from grpo.endpoint.served import Job
from rollout.environments.thoughts import shown
from rollout.group import Completion, Prompt


class ForkingEpisode(Episode):
    """A chat goes on with a segment where the chat template shows it as it was read, and else begins one. `given` has
    the ids of each answer, by the conversation that ends with it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.given: dict[str, list[int]] = {}

    def jobs(self, asked: Asked) -> list[Job]:
        [job] = super().jobs(asked)
        assert isinstance(job, Recorded)
        before = [plain(message) for message in asked.messages] if isinstance(asked, ChatAsked) else []

        def keep_completion(completion: Completion) -> None:
            job.keep_completion(completion)
            if before and not self.ended:
                self.given[_key([*before, self.turns[-1]])] = completion.token_ids

        return [replace(job, keep_completion=keep_completion)]

    def _read(self, asked: Asked) -> tuple[Prompt, Said]:
        prompt, said = super()._read(asked)
        if not isinstance(asked, ChatAsked):
            return prompt, said
        beginnings = {place: _key(said[: place + 1]) for place in range(len(said))}
        answers = {place: self.given[key] for place, key in beginnings.items() if key in self.given}
        rendered = partial(self._by_template, tools=asked.tools)
        ids = shown(self.tokenizer, rendered, asked.messages, answers, self.defaults.stop_token_ids)
        return replace(prompt, token_ids=ids), said

    def _heard(self, segment: Growing | None, said: Said) -> Said | None:
        known = [one.said for one in self.segments if said[: len(one.said)] == one.said]
        return max(known, key=len, default=None)

    def _after(self, segment: Growing, first: Prompt, said: Said, asked: Asked) -> list[int] | None:
        if not isinstance(asked, ChatAsked):
            return super()._after(segment, first, said, asked)
        known = [*segment.prompt.token_ids, *segment.ids]
        goes_on = first.token_ids[: len(known)] == known and not segment.waits
        return first.token_ids[len(known) :] if goes_on else None


def _key(said: Said) -> str:
    """A conversation as text, in whatever order a client writes the fields of a message."""
    return json.dumps(said, sort_keys=True)
