"""Who is decoded: the rows that are live, and the prompts that wait until finished rows leave.

Rows are ragged: each has its own length, also in the middle of a drafted block.

Axes: P prompts, G completions each, R live rows, T tokens of a prompt, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout.backends import Decoder
from rollout.decoding.common_beginning import beginning_of
from rollout.decoding.postprocess import Postprocess
from rollout.decoding.reader import Reader
from rollout.decoding.results import Results
from rollout.decoding.settings import RowSettings
from rollout.decoding.shared_rows import SharedReader
from rollout.drafts.drafts import Drafts
from rollout.group import Prompt, RolloutGroup
from rollout.rows import Prefilled, Rows, prefill_size
from rollout.sampling import Noise, SamplingParams

# One prefill reads at most so many tokens with padding; on a CPU, more do not fit its caches.
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 16384, 1024


@dataclass(frozen=True)
class RoundCounts:
    """What the host knows of the rows after a round, read from the device in one copy."""

    alive: int = 0  # rows that go on
    waits: int = 0  # rows that wait for their tools
    most_left: int = 0  # tokens that a live row may still get, where something can be drafted
    most_unread: int = 0  # tokens of a row that the draft head has not read
    longest_read: int = 0  # tokens of the longest row of the draft head's cache, once these are read

    @property
    def held(self) -> int:
        """Rows that live or wait."""
        return self.alive + self.waits


class Batch:
    """The prompts of a shard, and the rows that continue them.

    With `shares` completions share a row of the cache as long as they are alike. `aborts`: see `Postprocess`.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        settings: RowSettings | None = None,
        drafts: Drafts | None = None,
        shares: bool = False,
        aborts: bool = True,
    ) -> None:
        self.decoder, self.prompts, self.params = decoder, prompts, params
        self.device = decoder.trunk.device
        self.prefill_tokens = CPU_PREFILL_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS
        self.longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        self.settings = settings or RowSettings(prompts, params, decoder.tokenizer)
        self.drafts = drafts or Drafts(decoder, params, self.longest)
        self.room = self.drafts.room
        self.reader = (SharedReader if shares else Reader)(decoder.trunk, params.record_routing)
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=self.device)
        self.results = Results(len(prompts) * params.group_size, self.room, self.drafts.max_depth, self.device)
        self.postprocess = Postprocess(self.settings, self.results, self.drafts, self.stops, aborts=aborts)
        self.beginning = beginning_of(decoder, prompts, params)
        # Sorted by length, so that the prompts of one prefill need little padding; the longest are taken first.
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        self.rows: Rows | None = None
        self.counts = RoundCounts()
        self.admitted = 0  # completions that have begun

    @property
    def ended(self) -> int:
        """Completions that have ended."""
        return self.admitted - self.counts.held

    @property
    def live(self) -> Rows:
        """The rows, where there are some."""
        assert self.rows is not None
        return self.rows

    def noise(self, rows: Rows, new: int) -> Noise:
        """The noise of the next `new` tokens of each row."""
        positions = self.settings.start(rows) + rows.count[:, None] + self.results.steps[:new]
        return Noise(rows.keys_R2[:, None], positions, len(self.decoder.trunk.embedding))

    def groups(self) -> list[RolloutGroup]:
        """What was sampled, once all have ended."""
        decoder, settings = self.decoder, self.settings
        parts = self.prompts, decoder.tokenizer, settings.strings, decoder.version, settings.params.temperature
        groups = self.results.groups(*parts)
        return self.drafts.with_costs(groups)

    # ---- prompts are admitted ------------------------------------------------------------------------------------

    def admit_waiting(self) -> None:
        """Admit waiting prompts if at least a quarter of the rows is free."""
        group, most = self.params.group_size, self.decoder.max_rows
        while self.waiting and (not self.counts.held or most - self.counts.held >= max(group, most // 4)):
            self.admit_prompts(max(1, (most - self.counts.held) // group))

    def admit_prompts(self, places: int) -> None:
        """Prefill up to `places` prompts and add their rows after the live ones."""
        parts = []
        if self.counts.held and self.rows is not None:
            parts.append(self.rows)
        else:
            self.reader.clear()
            self.drafts.clear()
        while self.waiting and places > 0:
            lengths = [self.tokens_to_read(number) for number in self.waiting[: -places - 1 : -1]]
            size = prefill_size(lengths, self.prefill_tokens)
            places -= size
            rows, cache = self.prefill([self.waiting.pop() for _ in range(size)])
            self.reader.add(rows, cache, self.params.group_size)
            parts.append(rows)
        self.rows = Rows.concat(parts)
        self.reader.join()
        self.retire_ended()

    def tokens_to_read(self, number: int) -> int:
        """Counts the tokens of the prompt with this number that the trunk has to read."""
        return len(self.prompts[number].token_ids) - (self.beginning.length if self.beginning else 0)

    def prefill(self, numbers: Sequence[int]) -> tuple[Rows, Any]:
        """Read these prompts once. Their latents become the prefixes that rows share, and the last hidden state of each
        gives its rows their first tokens. Returns the rows and their cache."""
        trunk, prompts = self.decoder.trunk, [self.prompts[i] for i in numbers]
        lengths = torch.tensor([len(p.token_ids) for p in prompts], device=self.device)
        longest = max(len(p.token_ids) for p in prompts)
        token_ids = torch.tensor(
            [p.token_ids + [0] * (longest - len(p.token_ids)) for p in prompts], device=self.device
        )
        cache = trunk.cache(len(prompts), longest, lengths)
        if self.beginning:
            hidden = self.beginning.read(token_ids, lengths, cache)
        else:
            hidden = trunk(token_ids, torch.arange(longest, device=self.device).expand_as(token_ids), cache)
            cache.advance(lengths)
        if self.params.record_routing:
            self.results.add_prompt_routing(numbers, trunk.routing(), lengths, longest)
        cache = cache.fan_out(self.params.group_size, self.room, self.longest)
        self.drafts.add_prompts(Prefilled(torch.tensor(numbers, device=self.device), token_ids, hidden, lengths))
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]
        return self.begin_rows(numbers, lengths, last), cache

    def begin_rows(self, numbers: Sequence[int], lengths: Tensor, last: Tensor) -> Rows:
        """The rows of prompts of these `lengths` [P], with their first tokens, which the states [P, D] after the `last`
        tokens of the prompts give."""
        group = self.params.group_size
        self.admitted += len(numbers) * group
        indices, keys = [], []
        for number in numbers:
            for sample in range(group):
                indices.append(number * group + sample)
                keys.append(self.settings.noise_key(number, sample))
        rows = Rows.start(
            torch.tensor(indices, device=self.device),
            torch.tensor(keys, dtype=torch.int32, device=self.device),
            lengths.repeat_interleave(group),
            since=self.drafts.head.number if self.drafts.head else 0,
        )
        logits = self.decoder.trunk.logits(last).repeat_interleave(group, dim=0)[:, None]
        states = last.repeat_interleave(group, dim=0)[:, None]
        self.postprocess.choose(rows, logits, states, None, self.noise(rows, 1))
        return rows

    # ---- rows leave ----------------------------------------------------------------------------------------------

    def retire_ended(self) -> None:
        """Count the rows that ended. They leave when they are an eighth of the batch, since moving the caches at each
        end would cost more."""
        self.count_rows()
        rows = self.live
        if 0 < self.counts.held <= len(rows.alive) * 7 // 8:
            self.keep_rows((rows.alive | rows.waits).nonzero()[:, 0])

    def keep_rows(self, rows: Tensor) -> None:
        """These rows stay, and the others leave."""
        self.rows = self.live.select(rows)
        self.reader.select(rows)
        if self.drafts.head:
            self.drafts.head.select(self.rows, rows)

    def count_rows(self) -> None:
        """Find the rows that ended."""
        rows, head, sizes = self.live, self.drafts.head, self.reader.sizes()
        left = self.settings.limit(rows) - rows.count
        rows.alive = rows.alive & ~self.results.stopped[rows.index] & (left > 0)
        numbers = {"alive": rows.alive.sum(), "waits": rows.waits.sum()}
        if head:
            numbers["most_left"] = left.where(rows.alive, 0).max()
            numbers["most_unread"], numbers["longest_read"] = head.sizes(rows)
        read = torch.stack([*numbers.values(), *sizes]).tolist()
        self.counts = RoundCounts(**dict(zip(numbers, read, strict=False)))
        if sizes:
            self.reader.know(read[len(numbers) :])
        if head:
            head.known = self.counts.most_unread, self.counts.longest_read
