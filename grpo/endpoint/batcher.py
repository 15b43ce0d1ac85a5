"""The thread that decodes what clients ask for, and what it counts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from grpo.endpoint.api_error import ApiError
from rollout.decoding.engine import Engine
from rollout.relay import Relay
from rollout.request import News, Request
from rollout.requests.conversations import CACHE_TOKENS
from rollout.requests.serving import Serving
from rollout.sampling import SamplingParams


@dataclass
class Counts:
    """A server has done this since it began. `row_rounds` / `rounds` are the rows of a mean round."""

    completions: int = 0
    completion_tokens: int = 0
    cancelled: int = 0
    refused: int = 0  # with 429
    failed: int = 0
    rounds: int = 0
    row_rounds: int = 0
    target_forwards: int = 0  # of all completions together, as the next three
    drafted: int = 0
    accepted: int = 0
    fallbacks: int = 0  # accept: margin; forwards with a draft that was not clear enough
    cached_tokens: int = 0  # of prompts, which were read for an earlier request
    policies: int = 1  # that were served, one after another
    not_loaded: int = 0  # newer ones that could not be loaded
    tool_calls: int = 0  # in answers to requests with tools
    malformed_calls: int = 0  # answers whose calls could not be read, which are text as a whole
    unknown_tools: int = 0  # calls of tools that the request did not offer
    dropped_calls: int = 0  # after the first, for parallel_tool_calls: false


class Batcher:
    """Requests of one policy join its running batch between rounds. Those that come while a batch is decoded wait for
    others for at most `wait_s`, or until they fill the free rows, as each join copies the caches of all rows. At most
    `most_waiting` wait. The caches of conversations with `cache_tokens` tokens together are kept. `replace` gives a
    newer policy: the requests that are decoded stay with the one that began them, and all others get the newer one."""

    def __init__(
        self,
        engine: Engine | Relay,
        params: SamplingParams,
        *,
        most_waiting: int,
        wait_s: float,
        cache_tokens: int = CACHE_TOKENS,
    ) -> None:
        self.params, self.most_waiting, self.wait_s, self.cache_tokens = params, most_waiting, wait_s, cache_tokens
        self.engine, self.counts = engine, Counts()
        self._batches = [self._batch()]
        self._since: float | None = None  # when the oldest of those that wait has come
        self._seconds = 1.0  # that a completion takes, a moving mean
        self._began: dict[Request, float] = {}
        self._changed = threading.Condition()
        self._new: list[Request] = []
        self._gone: list[Request] = []
        self._newer: Engine | Relay | None = None
        self._closed = False
        self.error: BaseException | None = None  # the last one that has ended a batch
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def rows(self) -> int:
        """Counts the rows that are decoded now."""
        return sum(len(batch.requests) for batch in list(self._batches))

    @property
    def waiting(self) -> int:
        return len(self._new) + sum(len(batch.asked) for batch in list(self._batches))

    def submit(self, requests: Sequence[Request]) -> None:
        """Lets them join the batch. Raises ApiError if too many wait, and then none of them does."""
        with self._changed:
            free, waiting = max(0, self.engine.max_rows - self.rows), self.waiting
            if waiting + len(requests) > self.most_waiting + free:
                self.counts.refused += 1
                retry_s = max(1, math.ceil(self._seconds * waiting / self.engine.max_rows))
                message = f"too many requests wait (at most {self.most_waiting}); try again in {retry_s} s"
                raise ApiError(message, 429, code="rate_limit_exceeded", headers={"Retry-After": str(retry_s)})
            self._new += [] if self._closed else requests
            self._changed.notify()
        for request in requests if self._closed else ():
            request.tell(News(error="the server has ended"))

    def cancel(self, requests: Sequence[Request]) -> None:
        """Give these up: nobody waits for them any more. Those that have ended already are left alone."""
        with self._changed:
            self._gone += requests
            self._changed.notify()

    def replace(self, engine: Engine | Relay) -> None:
        with self._changed:
            self._newer = engine
            self._changed.notify()

    def close(self) -> None:
        """End the thread. Requests that are not finished get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(30)

    def add_counts(self, more: Mapping[str, int]) -> None:
        """Adds to the counts what was seen in a thread of its own."""
        with self._changed:
            for name, value in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + value)

    def metrics(self) -> dict[str, int]:
        return asdict(self.counts) | {"rows": self.rows, "waiting": self.waiting, "max_rows": self.engine.max_rows}

    # ---- the thread ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        why = "the server has ended"
        try:
            while self._take_requests():
                self._rounds()
        except BaseException as error:  # such as lack of memory for another batch: nobody shall wait in vain
            self.error, why = error, f"decoding has ended: {type(error).__name__}: {error}"
            with self._changed:
                self._closed = True
                for request in self._new:
                    self._batches[-1].add(request)
                self._new = []
        for batch in self._batches:
            batch.give_up(why)

    def _rounds(self) -> None:
        for batch in list(self._batches):
            try:
                self._round(batch)
            except BaseException as error:  # such as lack of memory: this batch fails, and the server goes on
                self.counts.failed += len(batch.give_up(f"decoding failed: {type(error).__name__}: {error}"))
                self.error = error
                fresh = self._batch()
                self._batches = [fresh if other is batch else other for other in self._batches]
        self._batches = [b for b in self._batches[:-1] if b.busy] + self._batches[-1:]

    def _take_requests(self) -> bool:
        """Waits for something to do, and takes over what others have left here. False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._new or self._gone or self._newer or any(b.busy for b in self._batches)
            )
            new, gone, newer = self._new, self._gone, self._newer
            self._new, self._gone, self._newer = [], [], None
            if self._closed:
                for request in new:
                    self._batches[-1].add(request)
                return False
        now = time.monotonic()
        for request in new:
            self._began[request] = now
            self._watch(request)
            self._batches[-1].add(request)
        if new and self._since is None:
            self._since = now
        if newer is not None:
            self.engine = newer
            batch = self._batch()
            batch.asked, self._batches[-1].asked = self._batches[-1].asked, batch.asked
            self._batches.append(batch)
            self.counts.policies += 1
        for request in gone:
            if self._began.pop(request, None) is not None:
                self.counts.cancelled += 1
                for batch in self._batches:
                    batch.drop(request)
        return True

    def _batch(self) -> Serving | Relay:
        """Returns a batch without requests. A relay is one itself."""
        if isinstance(self.engine, Engine):
            return Serving(self.engine.decoder, self.params, self.cache_tokens)
        return self.engine

    def _round(self, batch: Serving | Relay) -> None:
        if not batch.busy:
            return
        waited = self._since is not None and time.monotonic() - self._since >= self.wait_s
        joins = not batch.requests or len(batch.asked) >= batch.free or waited
        batch.round(join=joins)
        if batch is self._batches[-1] and not batch.asked:  # nobody waits for one of an older policy
            self._since = None
        if batch.alive:
            self.counts.rounds += 1
            self.counts.row_rounds += batch.alive

    def _watch(self, request: Request) -> None:
        """Count its completion before the client gets it."""
        tell = request.tell

        def counted(news: News) -> None:
            if (completion := news.completion) is not None:
                draft, counts = completion.draft, self.counts
                counts.completions += 1
                counts.completion_tokens += len(completion.token_ids)
                counts.target_forwards += draft.target_forwards
                counts.drafted += sum(draft.drafted)
                counts.accepted += sum(draft.accepted)
                counts.fallbacks += draft.fallbacks
                counts.cached_tokens += completion.cached
                self._seconds += (time.monotonic() - self._began[request] - self._seconds) / 8
            if completion is not None or news.error is not None:
                self._began.pop(request, None)
            tell(news)

        request.tell = counted
