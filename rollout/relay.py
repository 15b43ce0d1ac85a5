"""Requests that are decoded elsewhere: by the workers of a pool, or by a server of vLLM."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch

from policies.policy import Policy
from rollout.engine import Engine
from rollout.faults import RolloutError, prompt_fault
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from rollout.serving import News, Request, Serving

CALLS = count()
ROUNDS = 8  # of decoding between two exchanges, unless a completion ends before: so long a new request may wait


@dataclass(frozen=True)
class Answering:
    """How the requests of one call of a sampler are answered: the batch has `params`, and at most `max_rows` of them
    are decoded together; see `Serving`. `call` tells it from every other call."""

    call: int
    params: SamplingParams
    cache_tokens: int
    max_rows: int


class Relay:
    """Has the surface of an engine and of its `Serving`. `exchange` hands requests to a sampler and brings their news.

    A request that is lost with its sampler is asked once more: its tokens are the same (contract 4), and those that the
    client has are not told again.
    """

    def __init__(self, policy: Policy, version: int, answering: Answering, samplers: int = 1) -> None:
        self.policy, self.version, self.answering = policy, version, answering
        self.max_rows = answering.max_rows * samplers
        self.asked: deque[Request] = deque()
        self.requests: dict[int, Request] = {}  # by number, while they are decoded
        self.received: dict[int, int] = {}  # tokens that have come, by number
        self.gone: set[int] = set()  # that nobody waits for
        self._next = count()

    def exchange(self) -> Mapping[int, Sequence[News]]:
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        return bool(self.requests or self.asked)

    @property
    def alive(self) -> int:
        return len(self.requests)

    @property
    def free(self) -> int:
        return self.max_rows - len(self.requests)

    def check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        """Raises RolloutError or ValueError as `Engine.check` does."""
        params.check()
        for prompt in prompts:
            if fault := prompt_fault(prompt, params, self.policy.config.vocab_size, self.policy.max_length):
                raise RolloutError(fault)

    def add(self, request: Request) -> None:
        self.asked.append(request)

    def drop(self, request: Request) -> None:
        if request in self.asked:
            self.asked.remove(request)
        for number in [number for number, other in self.requests.items() if other is request]:
            del self.requests[number]
            self.gone.add(number)

    def give_up(self, why: str) -> list[Request]:
        given_up = [*self.requests.values(), *self.asked]
        self.requests, self.asked = {}, deque()
        for request in given_up:
            request.tell(News(error=why))
        return given_up

    def round(self, join: bool = True) -> None:
        """Those that wait are handed on, and all get what has come for them."""
        while self.asked:
            number = next(self._next)
            self.requests[number], self.received[number] = self.asked.popleft(), 0
        for number, news in self.exchange().items():
            for each in news:
                self._tell(number, each)

    def _tell(self, number: int, news: News) -> None:
        request = self.requests.get(number)
        if request is None:  # it was dropped
            return
        self.received[number] += len(news.token_ids)
        new = max(0, self.received[number] - request.told)
        request.told += new
        if news.completion is not None:
            del self.requests[number], self.received[number]
        start = len(news.token_ids) - new
        if new or news.completion is not None:
            request.tell(replace(news, token_ids=news.token_ids[start:], logprobs=news.logprobs[start:]))


class Desk:
    """The other side of a relay, in a worker: the batch of the call that is answered."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.close()

    def close(self) -> None:
        """Forget the batch, and with it the caches of its conversations."""
        self.answering: Answering | None = None
        self.serving: Serving | None = None
        self.requests: dict[int, Request] = {}
        self.news: dict[int, list[News]] = {}

    @torch.inference_mode()
    def answer(
        self, answering: Answering, new: Mapping[int, tuple[Prompt, SamplingParams]], gone: Sequence[int]
    ) -> dict[int, list[News]]:
        """Decode these requests, and those that are there, until one ends, at most ROUNDS rounds. Returns what is new
        by the numbers of the requests."""
        if self.answering != answering or self.serving is None:
            self.close()
            decoder = replace(self.engine.decoder, max_rows=answering.max_rows)
            self.answering, self.serving = answering, Serving(decoder, answering.params, answering.cache_tokens)
        self.news = {}
        for number in gone:
            if (request := self.requests.pop(number, None)) is not None:
                self.serving.drop(request)
        for number, (prompt, params) in new.items():
            self.requests[number] = Request(prompt, params, partial(self._tell, number))
            self.serving.add(self.requests[number])
        asked = len(self.requests)
        for _ in range(ROUNDS):
            if len(self.requests) == asked and self.serving.busy:
                self.serving.round()
        return self.news

    def _tell(self, number: int, news: News) -> None:
        self.news.setdefault(number, []).append(news)
        if news.completion is not None:
            del self.requests[number]
