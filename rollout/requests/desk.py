"""The other side of a relay: a worker that decodes the requests it is handed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from rollout.cost_table import CostTable
from rollout.decoding.engine import Engine
from rollout.group import Completion, Prompt
from rollout.relay import ROUNDS
from rollout.request import News, Request
from rollout.requests.serving import Serving
from rollout.sampling import SamplingParams


@dataclass(frozen=True)
class Answering:
    """How a worker answers the requests of one `call` of a sampler, which no other call has: by the weights of this
    version, in a batch with these parameters, see `Serving`."""

    call: int
    version: int
    params: SamplingParams
    cache_tokens: int
    max_rows: int
    costs: CostTable | None = None


class Desk:
    """The other side of a relay, in a worker: the batch of the call that is answered."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.close()

    def close(self) -> None:
        """Forget the batch, and with it the caches of its conversations."""
        self.call: int | None = None
        self.serving: Serving | None = None
        self.requests: dict[int, Request] = {}
        self.ended: dict[int, Completion] = {}

    @torch.inference_mode()
    def answer(
        self, answering: Answering, new: Mapping[int, tuple[Prompt, SamplingParams]], gone: Sequence[int]
    ) -> dict[int, Completion]:
        """Decode these requests, and those that are there, until one ends, at most ROUNDS rounds. Returns what has
        ended, by the numbers of the requests."""
        if self.call != answering.call or self.serving is None:
            self.close()
            self.engine.costs = answering.costs or self.engine.costs
            decoder = replace(self.engine.decoder, max_rows=answering.max_rows)
            self.call, self.serving = answering.call, Serving(decoder, answering.params, answering.cache_tokens)
        self.ended = {}
        for number in set(gone) & set(self.requests):
            self.serving.drop(self.requests.pop(number))
        for number, (prompt, params) in new.items():
            self.requests[number] = Request(prompt, params, partial(self._tell, number))
            self.serving.add(self.requests[number])
        for _ in range(ROUNDS):
            if not self.ended and self.serving.busy:
                self.serving.round()
        return self.ended

    def _tell(self, number: int, news: News) -> None:
        if news.completion is not None:
            self.ended[number] = news.completion
            del self.requests[number]
