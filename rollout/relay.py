"""Requests that are decoded elsewhere: by the workers of a pool, or by a server of vLLM."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch

from policies.policy import Policy
from rollout.depth import CostTable
from rollout.engine import Engine
from rollout.faults import RolloutError, prompt_fault
from rollout.group import Completion, Prompt
from rollout.sampling import SamplingParams
from rollout.serving import News, Request, Serving

ROUNDS = 8  # of decoding between two exchanges, unless a completion ends before: so long a new request may wait


class Relay:
    """Has the surface of an engine and of its `Serving`. `exchange` hands requests to a sampler and brings the
    completions that have ended, by the numbers of the requests: each comes in one piece.

    A request that is lost with its sampler is handed on once more: its tokens are the same (contract 4).
    """

    def __init__(self, policy: Policy, version: int, max_rows: int) -> None:
        self.policy, self.version, self.max_rows = policy, version, max_rows
        self.asked: deque[Request] = deque()
        self.requests: dict[int, Request] = {}  # by number, while they are decoded
        self.gone: set[int] = set()  # that nobody waits for
        self._numbers = count()

    def exchange(self) -> Mapping[int, Completion]:
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
        """Those that wait are handed on, and those that have ended are told."""
        while self.asked:
            self.requests[next(self._numbers)] = self.asked.popleft()
        for number, completion in self.exchange().items():
            if number in self.requests:  # else it was dropped
                news = News(completion.token_ids, completion.logprobs, completion, version=completion.policy_version)
                self.requests.pop(number).tell(news)


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
