"""A batch that requests join and leave while it is decoded, each with its own temperature, limit, seed and stop texts.

A request gets the tokens that it would get alone: noise is keyed by seed, prompt and sample, and by the position of the
token (contract 4).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from policies.devices import has_float64
from rollout.backends import Decoder
from rollout.decoding.common_beginning import beginning_of
from rollout.decoding.results import Results
from rollout.decoding.shard import Decoding
from rollout.group import Completion, Prompt
from rollout.request import News, Request
from rollout.requests.conversations import Conversation, Conversations
from rollout.rows import Prefilled, Rows
from rollout.sampling import SamplingParams, row_key
from rollout.stop_strings import StopStrings

UNREAD = 64  # rounds without a draft; in the next one the draft head drafts, so that what it has not read stays short


class Serving(Decoding):
    """Call `add` and `drop` between rounds, and `round` while it is `busy`. One thread calls all of them. The caches of
    conversations with up to `cache_tokens` tokens together stay when their rows leave.

    >>> serving = Serving(engine.decoder, SamplingParams(group_size=1, stop_token_ids=(2,)))
    >>> serving.add(Request(Prompt("", "2 + 3 = ", [5, 9, 6]), replace(serving.params, temperature=0.0), print))
    >>> while serving.busy:
    ...     serving.round()
    """

    def __init__(self, decoder: Decoder, params: SamplingParams, cache_tokens: int = 0) -> None:
        can_keep = not (getattr(decoder.trunk, "both_ways", False) or params.record_routing)
        self.conversations = Conversations(cache_tokens if can_keep else 0)
        self.beginnings: dict[int, tuple[Conversation, int]] = {}  # by place, with the number of tokens
        self.requests: dict[int, Request] = {}  # by their places in the results, while they are decoded
        self.asked: deque[Request] = deque()
        self.most_rows, self.undrafted = decoder.max_rows, 0
        super().__init__(decoder, [], params)
        depth = self.drafts.max_depth
        self.room = decoder.context + depth + 1
        self.steps = torch.arange(self.room, device=self.device)
        if self.drafter:
            self.drafter.steps = self.steps
        self.results = Results(self.most_rows, self.room, depth, self.device)
        self.prompts: list[Prompt] = [Prompt("", "", [])] * self.most_rows
        self.limits = torch.ones(self.most_rows, dtype=torch.long, device=self.device)
        self.starts = torch.zeros(self.most_rows, dtype=torch.long, device=self.device)
        kind = torch.float64 if has_float64(self.device) else torch.float32
        self.temperatures = torch.ones(self.most_rows, dtype=kind, device=self.device)
        self.ends: dict[int, StopStrings] = {}

    @property
    def busy(self) -> bool:
        return bool(self.requests or self.asked)

    @property
    def free(self) -> int:
        """Counts the rows that could join."""
        return self.most_rows - len(self.requests)

    def add(self, request: Request) -> None:
        """The request joins as soon as a row is free. Check it with `Engine.check` first."""
        self.asked.append(request)

    def drop(self, request: Request) -> None:
        """Frees the row of a request that nobody waits for any more. It may have ended already."""
        if request in self.asked:
            self.asked.remove(request)
        for place, other in list(self.requests.items()):
            if other is request:
                self._leave(place)
                if self.live is not None:
                    self.live.alive = self.live.alive & (self.live.index != place)
                    self._retire()

    def round(self, join: bool = True) -> None:
        """Requests join, and each row gets a token or more. Without `join` those that wait go on waiting."""
        if join and self.asked and self.free:
            self._join()
        if self.alive:
            self.forward()
        self._tell()

    def give_up(self, why: str) -> list[Request]:
        """Decoding cannot go on: everybody is told `why`."""
        given_up = [*self.requests.values(), *self.asked]
        self.requests, self.asked, self.live, self.alive, self.held = {}, deque(), None, 0, 0
        for request in given_up:
            request.tell(News(error=why))
        return given_up

    # ---- what a row is sampled with -----------------------------------------------------------------------------

    def temperature(self, rows: Rows) -> Tensor:
        return self.temperatures[rows.index]

    def limit(self, rows: Rows) -> Tensor:
        return self.limits[rows.index]

    def start(self, rows: Rows) -> Tensor:
        return self.starts[rows.index][:, None]

    def to_read(self, number: int) -> int:
        cached = self.requests[number].cached
        return len(self.prompts[number].token_ids) - cached if cached else super().to_read(number)

    def key(self, number: int, sample: int) -> tuple[int, int]:
        prompt = self.prompts[number]
        return row_key(self.requests[number].params, prompt.prompt_id, prompt.first_sample + sample)

    def stop_strings(self, index: int) -> StopStrings | None:
        return self.ends.get(index)

    # ---- rows come and go ---------------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Lets requests join between rounds."""

    def _join(self) -> None:
        if self.live is not None and self.alive < len(self.live.alive):
            # The place of a row that has ended is free only without the row, which still writes there.
            self._keep(self.live.alive.nonzero()[:, 0])
        free = [place for place in range(self.most_rows) if place not in self.requests]
        joining = {place: self.asked.popleft() for place in free[: len(self.asked)]}
        places = list(joining)
        self.requests |= joining
        self.results.clear(places)
        self.beginnings = {}
        for place, request in joining.items():
            self.prompts[place] = request.prompt
            beginning = self.conversations.find(request.prompt.token_ids)
            if beginning is not None:
                self.beginnings[place], request.cached = beginning, beginning[1]
            if request.params.stop_strings:
                self.ends[place] = StopStrings(self.decoder.tokenizer, request.params.stop_strings)
        self.strings = next(iter(self.ends.values()), None)
        params = [request.params for request in joining.values()]
        self.limits[places] = self.limits.new_tensor([each.max_completion_tokens for each in params])
        self.starts[places] = self.starts.new_tensor([each.start for each in params])
        self.temperatures[places] = self.temperatures.new_tensor([each.temperature for each in params])
        new = [self.prompts[place] for place in places if place not in self.beginnings]
        self.beginning = beginning_of(self.decoder, new, self.params)
        self.waiting = sorted(places, key=self.to_read)
        self.longest = max(len(self.prompts[place].token_ids) for place in places)
        self.room = max(each.max_completion_tokens for each in params) + self.drafts.max_depth + 1
        if self.drafter:
            self.drafter.room, self.drafter.longest = self.room, self.longest
        self._admit(len(places))

    def _prefill(self, numbers: Sequence[int]) -> tuple[Rows, Any]:
        continued = [number for number in numbers if number in self.beginnings]
        others = [number for number in numbers if number not in self.beginnings]
        if not continued:
            return super()._prefill(others)
        rows, cache = self._go_on(continued)
        if others:
            rows_of_others, cache_of_others = super()._prefill(others)
            return Rows.concat([rows, rows_of_others]), cache.join([cache_of_others])
        return rows, cache

    def _go_on(self, numbers: Sequence[int]) -> tuple[Rows, Any]:
        """Reads what is new in these prompts, after what was read of them for earlier requests."""
        beginnings = [self.beginnings[number] for number in numbers]
        rests = [self.prompts[i].token_ids[read:] for i, (_, read) in zip(numbers, beginnings, strict=True)]
        longest = max(len(rest) for rest in rests)
        read_R = torch.tensor([read for _, read in beginnings], device=self.device)
        new_R = torch.tensor([len(rest) for rest in rests], device=self.device)
        token_ids = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests], device=self.device)
        positions = read_R[:, None] + torch.arange(longest, device=self.device)
        first, *others = [conversation.trunk.cut(read) for conversation, read in beginnings]
        cache = first.join(others, longest + self.room)
        hidden = self.trunk(token_ids, positions.clamp(max=self.decoder.context - 1), cache)
        cache.advance(new_R)
        heads = [one.head.cut(read + 1) for one, read in beginnings if one.head is not None]
        self.drafts.begin(Prefilled(torch.tensor(numbers, device=self.device), token_ids, hidden, new_R, heads))
        last = hidden[torch.arange(len(numbers), device=self.device), new_R - 1]
        return self._begin(numbers, read_R + new_R, last), cache

    def _keep(self, rows: Tensor) -> None:
        assert self.live is not None
        leaves = torch.ones_like(self.live.alive).index_fill(0, rows, False)
        for row in leaves.nonzero()[:, 0]:
            self._remember(row[None])
        if len(rows):
            super()._keep(rows)

    def _remember(self, row: Tensor) -> None:
        """Keep the caches of a row that is about to leave: the next request may go on with its text."""
        assert self.live is not None
        place, has_states = int(self.live.index[row]), getattr(self.cache, "states", None) is not None
        can_keep = hasattr(self.cache, "excerpt") and not has_states and not self.results.aborted[place]
        if not can_keep or not self.conversations.most_tokens:
            return
        head = self.drafter.ready(self.live) if self.drafter else None
        ids = self.prompts[place].token_ids + self.results.token_ids[place, : self.results.counts[place]].tolist()
        read = len(ids) - 1 if head is None else int(head.lengths_R[row])
        of_head = None if head is None else head.excerpt(row)
        self.conversations.add(Conversation(ids, read, self.cache.excerpt(row), of_head))

    def _leave(self, place: int) -> None:
        del self.requests[place]
        self.ends.pop(place, None)
        self.strings = next(iter(self.ends.values()), None)

    def _plan(self, live: Rows) -> int:
        return self._at_once(super()._plan(live))

    def _graph_depth(self, live: Rows) -> int:
        return self._at_once(super()._graph_depth(live))

    def _at_once(self, depth: int) -> int:
        """Chooses the depth as in any shard, but drafts at once, and again before there is too much to read."""
        if self.drafter and not depth and (self.drafter.cache is None or self.undrafted >= UNREAD):
            depth = 1
        self.undrafted = 0 if depth else self.undrafted + 1
        return depth

    # ---- new tokens go to their requests -----------------------------------------------------------------------------

    def _tell(self) -> None:
        if not self.requests:
            return
        alive = set() if self.live is None else set(self.live.index[self.live.alive].tolist())
        shares = [cost / len(self.requests) for cost in (self.drafts.cost, self.drafts.plain_cost)]
        self.drafts.cost = self.drafts.plain_cost = 0.0
        counts = self.results.counts.tolist()
        for place, request in list(self.requests.items()):
            new, ended = slice(request.told, counts[place]), place not in alive
            ids, logprobs = (x[place, new].tolist() for x in (self.results.token_ids, self.results.logprobs))
            request.told = counts[place]
            request.cost, request.plain_cost = request.cost + shares[0], request.plain_cost + shares[1]
            completion = self._completion(place) if ended else None
            if ended:
                self._leave(place)
            request.tell(News(ids, logprobs, completion, version=self.decoder.version))

    def _completion(self, place: int) -> Completion:
        only = self.results.of([place])
        parts = [self.prompts[place]], self.decoder.tokenizer, self.ends.get(place), self.decoder.version
        completion, request = only.groups(*parts)[0].completions[0], self.requests[place]
        completion.draft.cost, completion.draft.plain_cost = round(request.cost, 3), round(request.plain_cost, 3)
        completion.cached = request.cached
        return completion
