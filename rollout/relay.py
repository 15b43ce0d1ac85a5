"""Requests that are decoded elsewhere: by the workers of a pool, or by a server of vLLM."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count

from policies.policy import Policy
from rollout.faults import RolloutError, prompt_fault
from rollout.group import Completion, Prompt
from rollout.request import News, Request
from rollout.sampling import SamplingParams

ROUNDS = 8  # of decoding between two exchanges, unless a completion ends before: so long a new request may wait


class Relay:
    """Has the surface of an engine and of its `Serving`. `exchange` hands requests to a sampler and brings the
    completions that have ended, by the numbers of the requests: each comes in one piece.

    A request that is lost with its sampler is handed on once more: its tokens are the same (contract 4).
    """

    def __init__(self, policy: Policy, version: int, max_rows: int, context: int | None = None) -> None:
        self.policy, self.version, self.max_rows = policy, version, max_rows
        self.context = policy.max_length if context is None else context
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
        vocabulary = self.policy.config.get_text_config(decoder=True).vocab_size
        for prompt in prompts:
            if fault := prompt_fault(prompt, params, vocabulary, self.context):
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
        self.gone |= set(self.requests)
        self.requests, self.asked = {}, deque()
        for request in given_up:
            request.tell(News(error=why))
        return given_up

    def round(self, join: bool = True) -> None:
        """Hands on the requests that wait, and tells those that have ended."""
        while self.asked:
            self.requests[next(self._numbers)] = self.asked.popleft()
        for number, completion in self.exchange().items():
            if number in self.requests:  # else it was dropped
                news = News(completion.token_ids, completion.logprobs, completion, version=completion.policy_version)
                self.requests.pop(number).tell(news)
