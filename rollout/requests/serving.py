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
from rollout.decoding.batch import Batch, RoundCounts
from rollout.decoding.common_beginning import beginning_of
from rollout.decoding.settings import RowSettings
from rollout.decoding.shard import Decoding
from rollout.drafts.drafts import Drafts
from rollout.group import Completion, Prompt
from rollout.request import News, Request
from rollout.requests.conversations import Conversation, Conversations
from rollout.rows import Prefilled, Rows
from rollout.sampling import SamplingParams, row_key
from rollout.stop_strings import StopStrings

UNREAD = 64  # rounds without a draft; in the next one the draft head drafts, so that what it has not read stays short


class RequestSettings(RowSettings):
    """What each request is sampled with, by its place in the results."""

    def __init__(self, decoder: Decoder, params: SamplingParams) -> None:
        super().__init__([], params, decoder.tokenizer)
        device, places = decoder.trunk.device, decoder.max_rows
        self.tokenizer = decoder.tokenizer
        self.requests: dict[int, Request] = {}
        self.ends: dict[int, StopStrings] = {}
        self.limits = torch.ones(places, dtype=torch.long, device=device)
        self.starts = torch.zeros(places, dtype=torch.long, device=device)
        kind = torch.float64 if has_float64(device) else torch.float32
        self.temperatures = torch.ones(places, dtype=kind, device=device)

    def join(self, joining: dict[int, Request]) -> None:
        self.requests |= joining
        places, params = list(joining), [request.params for request in joining.values()]
        for place, request in joining.items():
            if request.params.stop_strings:
                self.ends[place] = StopStrings(self.tokenizer, request.params.stop_strings)
        self.limits[places] = self.limits.new_tensor([each.max_completion_tokens for each in params])
        self.starts[places] = self.starts.new_tensor([each.start for each in params])
        self.temperatures[places] = self.temperatures.new_tensor([each.temperature for each in params])

    def leave(self, place: int) -> None:
        del self.requests[place]
        self.ends.pop(place, None)

    def temperature(self, rows: Rows) -> Tensor:
        return self.temperatures[rows.index]

    def limit(self, rows: Rows) -> Tensor:
        return self.limits[rows.index]

    def start(self, rows: Rows) -> Tensor:
        return self.starts[rows.index][:, None]

    def noise_key(self, number: int, sample: int) -> tuple[int, int]:
        request = self.requests[number]
        return row_key(request.params, request.prompt.prompt_id, request.prompt.first_sample + sample)

    def stop_strings(self, index: int) -> StopStrings | None:
        return self.ends.get(index)

    @property
    def any_stop_strings(self) -> bool:
        return bool(self.ends)


class ServingDrafts(Drafts):
    """Chooses the depth as in any shard, but drafts at once, and again before there is too much to read."""

    undrafted = 0  # rounds without a draft

    def plan(self, live: Rows, alive: int, most: int) -> int:
        return self._at_once(super().plan(live, alive, most))

    def of_graph(self, live: Rows) -> int:
        return self._at_once(super().of_graph(live))

    def _at_once(self, depth: int) -> int:
        if self.head and not depth and (self.head.cache is None or self.undrafted >= UNREAD):
            depth = 1
        self.undrafted = 0 if depth else self.undrafted + 1
        return depth


class RequestBatch(Batch):
    """The rows of requests: one each, whose place in the results is free again when it leaves.

    The caches of conversations with up to `cache_tokens` tokens together stay when their rows leave.
    """

    settings: RequestSettings
    prompts: list[Prompt]

    def __init__(self, decoder: Decoder, params: SamplingParams, cache_tokens: int) -> None:
        places = [Prompt("", "", [])] * decoder.max_rows
        drafts = ServingDrafts(decoder, params, 0, decoder.context)
        super().__init__(decoder, places, params, settings=RequestSettings(decoder, params), drafts=drafts)
        self.waiting = []  # prompts come with their requests
        can_keep = not (getattr(decoder.trunk, "both_ways", False) or params.record_routing)
        self.conversations = Conversations(cache_tokens if can_keep else 0)
        self.continued: dict[int, tuple[Conversation, int]] = {}  # by place, with the number of tokens

    def admit_waiting(self) -> None:
        """Requests join between rounds."""

    def join(self, requests: deque[Request]) -> None:
        """Admit as many of them as places are free."""
        if self.rows is not None and self.counts.alive < len(self.rows.alive):
            # The place of a row that has ended is free only without the row, which still writes there.
            self.keep_rows(self.rows.alive.nonzero()[:, 0])
        free = [place for place in range(len(self.prompts)) if place not in self.settings.requests]
        joining = {place: requests.popleft() for place in free[: len(requests)]}
        places = list(joining)
        self.settings.join(joining)
        self.results.clear(places)
        self.continued = {}
        for place, request in joining.items():
            self.prompts[place] = request.prompt
            conversation = self.conversations.find(request.prompt.token_ids)
            if conversation is not None:
                self.continued[place], request.cached = conversation, conversation[1]
        new = [self.prompts[place] for place in places if place not in self.continued]
        self.beginning = beginning_of(self.decoder, new, self.params)
        self.waiting = sorted(places, key=self.tokens_to_read)
        self.longest = max(len(self.prompts[place].token_ids) for place in places)
        limits = [request.params.max_completion_tokens for request in joining.values()]
        self.room = max(limits) + self.drafts.max_depth + 1
        if self.drafts.head:
            self.drafts.head.room, self.drafts.head.longest = self.room, self.longest
        self.admit_prompts(len(places))

    def tokens_to_read(self, number: int) -> int:
        cached = self.settings.requests[number].cached
        return len(self.prompts[number].token_ids) - cached if cached else super().tokens_to_read(number)

    def prefill(self, numbers: Sequence[int]) -> tuple[Rows, Any]:
        continued = [number for number in numbers if number in self.continued]
        others = [number for number in numbers if number not in self.continued]
        if not continued:
            return super().prefill(others)
        rows, cache = self._read_rests(continued)
        if others:
            rows_of_others, cache_of_others = super().prefill(others)
            return Rows.concat([rows, rows_of_others]), cache.join([cache_of_others])
        return rows, cache

    def _read_rests(self, numbers: Sequence[int]) -> tuple[Rows, Any]:
        """Read what is new in these prompts, after what was read of them for earlier requests."""
        beginnings = [self.continued[number] for number in numbers]
        rests = [self.prompts[i].token_ids[read:] for i, (_, read) in zip(numbers, beginnings, strict=True)]
        longest = max(len(rest) for rest in rests)
        read_R = torch.tensor([read for _, read in beginnings], device=self.device)
        new_R = torch.tensor([len(rest) for rest in rests], device=self.device)
        token_ids = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests], device=self.device)
        positions = read_R[:, None] + torch.arange(longest, device=self.device)
        first, *others = [conversation.trunk.cut(read) for conversation, read in beginnings]
        cache = first.join(others, longest + self.room)
        hidden = self.decoder.trunk(token_ids, positions.clamp(max=self.decoder.context - 1), cache)
        cache.advance(new_R)
        heads = [one.head.cut(read + 1) for one, read in beginnings if one.head is not None]
        self.drafts.add_prompts(Prefilled(torch.tensor(numbers, device=self.device), token_ids, hidden, new_R, heads))
        last = hidden[torch.arange(len(numbers), device=self.device), new_R - 1]
        return self.begin_rows(numbers, read_R + new_R, last), cache

    def keep_rows(self, rows: Tensor) -> None:
        leaves = torch.ones_like(self.live.alive).index_fill(0, rows, False)
        for row in leaves.nonzero()[:, 0]:
            self._remember(row[None])
        if len(rows):
            super().keep_rows(rows)

    def _remember(self, row: Tensor) -> None:
        """Keep the caches of a row that is about to leave: the next request may go on with its text."""
        cache, place = self.reader.cache, int(self.live.index[row])
        has_states = getattr(cache, "states", None) is not None
        can_keep = hasattr(cache, "excerpt") and not has_states and not self.results.aborted[place]
        if not can_keep or not self.conversations.most_tokens:
            return
        head = self.drafts.head.ready(self.live) if self.drafts.head else None
        ids = self.prompts[place].token_ids + self.results.token_ids[place, : self.results.counts[place]].tolist()
        read = len(ids) - 1 if head is None else int(head.lengths_R[row])
        of_head = None if head is None else head.excerpt(row)
        self.conversations.add(Conversation(ids, read, cache.excerpt(row), of_head))

    def end(self, place: int) -> None:
        """The request at this place leaves. Its row, which may still be alive, goes with the next rows that do."""
        self.settings.leave(place)
        if self.rows is not None and bool((self.rows.alive & (self.rows.index == place)).any()):
            self.rows.alive = self.rows.alive & (self.rows.index != place)
            self.retire_ended()

    def give_up(self) -> None:
        for place in list(self.settings.requests):
            self.settings.leave(place)
        self.rows, self.counts = None, RoundCounts()

    def completion(self, place: int) -> Completion:
        """What the request at this place has got, which has ended."""
        only, request = self.results.of([place]), self.settings.requests[place]
        of_policy = self.settings.ends.get(place), self.decoder.version, request.params.temperature
        [group] = only.groups([self.prompts[place]], self.decoder.tokenizer, *of_policy)
        [completion] = group.completions
        completion.draft.cost, completion.draft.plain_cost = round(request.cost, 3), round(request.plain_cost, 3)
        completion.cached = request.cached
        return completion


class Serving:
    """Call `add` and `drop` between rounds, and `round` while it is `busy`. One thread calls all of them.

    >>> serving = Serving(engine.decoder, SamplingParams(group_size=1, stop_token_ids=(2,)))
    >>> serving.add(Request(Prompt("", "2 + 3 = ", [5, 9, 6]), replace(serving.params, temperature=0.0), print))
    >>> while serving.busy:
    ...     serving.round()
    """

    def __init__(self, decoder: Decoder, params: SamplingParams, cache_tokens: int = 0) -> None:
        self.params = params
        self.batch = RequestBatch(decoder, params, cache_tokens)
        self.decoding = Decoding(self.batch)
        self.asked: deque[Request] = deque()

    @property
    def requests(self) -> dict[int, Request]:
        """Those that are decoded, by their places in the results."""
        return self.batch.settings.requests

    @property
    def busy(self) -> bool:
        return bool(self.requests or self.asked)

    @property
    def alive(self) -> int:
        """Counts the rows that are decoded."""
        return self.batch.counts.alive

    @property
    def free(self) -> int:
        """Counts the rows that could join."""
        return len(self.batch.prompts) - len(self.requests)

    def add(self, request: Request) -> None:
        """The request joins as soon as a row is free. Check it with `Engine.check` first."""
        self.asked.append(request)

    def drop(self, request: Request) -> None:
        """Frees the row of a request that nobody waits for any more. It may have ended already."""
        if request in self.asked:
            self.asked.remove(request)
        for place, other in list(self.requests.items()):
            if other is request:
                self.batch.end(place)

    def round(self, join: bool = True) -> None:
        """Requests join, and each row gets a token or more. Without `join` those that wait go on waiting."""
        if join and self.asked and self.free:
            self.batch.join(self.asked)
        if self.alive:
            self.decoding.decode_round()
        self._tell_requests()

    def give_up(self, why: str) -> list[Request]:
        """Decoding cannot go on: everybody is told `why`."""
        given_up = [*self.requests.values(), *self.asked]
        self.batch.give_up()
        self.asked = deque()
        for request in given_up:
            request.tell(News(error=why))
        return given_up

    def _tell_requests(self) -> None:
        """New tokens go to their requests."""
        if not self.requests:
            return
        batch, rows, drafts = self.batch, self.batch.rows, self.batch.drafts
        alive = set() if rows is None else set(rows.index[rows.alive].tolist())
        shares = [cost / len(self.requests) for cost in (drafts.cost, drafts.plain_cost)]
        drafts.cost = drafts.plain_cost = 0.0
        results, counts = batch.results, batch.results.counts.tolist()
        for place, request in list(self.requests.items()):
            new, ended = slice(request.told, counts[place]), place not in alive
            ids, logprobs = (x[place, new].tolist() for x in (results.token_ids, results.logprobs))
            request.told = counts[place]
            request.cost, request.plain_cost = request.cost + shares[0], request.plain_cost + shares[1]
            completion = batch.completion(place) if ended else None
            if ended:
                batch.end(place)
            request.tell(News(ids, logprobs, completion, version=batch.decoder.version))
