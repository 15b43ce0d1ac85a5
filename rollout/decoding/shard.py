"""Decoding one shard: prefill each prompt once, then draft and verify until every row has ended.

Rows are ragged: each has its own length, also in the middle of a drafted block. Finished rows leave, and waiting
prompts take their places.

Axes: P prompts, G completions each, R live rows, S = k + 1 tokens of a verifying forward, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.decoding.latent_cache import LatentCache
from rollout.backends import Decoder
from rollout.decoding.common_beginning import beginning_of
from rollout.decoding.results import Results
from rollout.drafts.drafts import Drafted, Drafts
from rollout.drafts.speculative import until_end, verify_draft
from rollout.group import Prompt, RolloutGroup
from rollout.rows import Prefilled, Rows, Tokens, prefill_size
from rollout.sampling import Noise, SamplingParams, choose, logprobs_of, row_key
from rollout.stop_strings import StopStrings

if TYPE_CHECKING:
    from rollout.compiled.rounds import Rounds

# One prefill reads at most so many tokens with padding; on a CPU, more do not fit its caches.
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 16384, 1024


class Decoding:
    """Decodes one shard: call `forward` until `done`, then take the `groups`.

    A row whose logits are not finite is aborted. With `aborts=False` it goes on, to measure time.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], params: SamplingParams, *, aborts: bool = True
    ) -> None:
        self.decoder, self.prompts, self.params, self.aborts = decoder, prompts, params, aborts
        self.trunk, self.device = decoder.trunk, decoder.trunk.device
        self.vocabulary = len(decoder.trunk.embedding)
        self.prefill_tokens = CPU_PREFILL_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS
        self.longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        self.drafts = Drafts(decoder, params, self.longest)
        self.drafter, self.room = self.drafts.head, self.drafts.room
        self.steps = torch.arange(self.room, device=self.device)
        self.strings = StopStrings(decoder.tokenizer, params.stop_strings) if params.stop_strings else None
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=self.device)
        self.results = Results(len(prompts) * params.group_size, self.room, self.drafts.max_depth, self.device)
        self.beginning = beginning_of(decoder, prompts, params)
        # Sorted by length, so that the prompts of one prefill need little padding; the longest are taken first.
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        self.rounds: Rounds | None = None
        if params.compiled:
            from rollout.compiled.rounds import rounds_of

            self.rounds = rounds_of(decoder, params, self.stops)
        self.live: Rows | None = None
        self.cache: Any = None
        self.admitted = self.ended_rows = self.alive = self.held = 0  # `held`: rows that live or wait
        self.most_left = 0  # tokens that a live row may still get
        self._refill()

    @property
    def done(self) -> bool:
        return self.ended_rows == len(self.results)

    # What a row is sampled with. Here it is the same for all rows; requests that are served have their own.

    def temperature(self, rows: Rows) -> float | Tensor:
        return self.params.temperature

    def limit(self, rows: Rows) -> int | Tensor:
        """Most tokens of a completion."""
        return self.params.max_completion_tokens

    def start(self, rows: Rows) -> int | Tensor:
        """Tokens that a completion had before its prompt ended, after which its noise goes on: [R, 1], or one for
        all."""
        return self.params.start

    def key(self, number: int, sample: int) -> tuple[int, int]:
        """The key of the noise of one completion of the prompt with this number."""
        prompt = self.prompts[number]
        return row_key(self.params, prompt.prompt_id, prompt.first_sample + sample)

    def stop_strings(self, index: int) -> StopStrings | None:
        return self.strings

    def to_read(self, number: int) -> int:
        """Counts the tokens of the prompt with this number that the trunk has to read."""
        return len(self.prompts[number].token_ids) - (self.beginning.length if self.beginning else 0)

    def groups(self) -> list[RolloutGroup]:
        """Gives what was sampled, once all have ended."""
        groups = self.results.groups(self.prompts, self.decoder.tokenizer, self.strings, self.decoder.version)
        return self.drafts.with_costs(groups)

    # ---- rows come and go ---------------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Admit waiting prompts if at least a quarter of the rows is free."""
        group, most = self.params.group_size, self.decoder.max_rows
        while self.waiting and (not self.held or most - self.held >= max(group, most // 4)):
            self._admit(max(1, (most - self.held) // group))

    def _admit(self, places: int) -> None:
        """Prefill up to `places` prompts and add their rows after the live ones."""
        rows, caches = ([self.live], [self.cache]) if self.held and self.live is not None else ([], [])
        if self.drafter and not rows:
            self.drafter.forget()
        while self.waiting and places > 0:
            next_ones = [self.to_read(i) for i in self.waiting[: -places - 1 : -1]]
            size = prefill_size(next_ones, self.prefill_tokens)
            places -= size
            new, cache = self._prefill([self.waiting.pop() for _ in range(size)])
            rows.append(new)
            caches.append(cache)
        self.live = Rows.concat(rows)
        self.cache = caches[0].join(caches[1:]) if len(caches) > 1 else caches[0]
        self._retire()

    def _prefill(self, numbers: Sequence[int]) -> tuple[Rows, Any]:
        """Read these prompts once. Their latents become the prefixes that rows share, and the last hidden state of each
        gives its rows their first tokens."""
        group, prompts = self.params.group_size, [self.prompts[i] for i in numbers]
        lengths = torch.tensor([len(p.token_ids) for p in prompts], device=self.device)
        longest = max(len(p.token_ids) for p in prompts)
        token_ids = torch.tensor(
            [p.token_ids + [0] * (longest - len(p.token_ids)) for p in prompts], device=self.device
        )
        cache = self.trunk.cache(len(prompts), longest, lengths)
        if self.beginning:
            hidden = self.beginning.read(token_ids, lengths, cache)
        else:
            hidden = self.trunk(token_ids, torch.arange(longest, device=self.device).expand_as(token_ids), cache)
            cache.advance(lengths)
        if self.params.record_routing:
            self.results.add_prompt_routing(numbers, self.trunk.routing(), lengths, longest)
        cache = cache.fan_out(group, self.room, self.longest)
        self.drafts.begin(Prefilled(torch.tensor(numbers, device=self.device), token_ids, hidden, lengths))
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]
        return self._begin(numbers, lengths, last), cache

    def _begin(self, numbers: Sequence[int], lengths: Tensor, last: Tensor) -> Rows:
        """Gives the rows of prompts of these `lengths` [P] their first tokens, which the states [P, D] after the `last`
        tokens of the prompts give."""
        group = self.params.group_size
        self.admitted += len(numbers) * group
        keys = [self.key(number, sample) for number in numbers for sample in range(group)]
        rows = Rows.start(
            torch.tensor([i * group + sample for i in numbers for sample in range(group)], device=self.device),
            torch.tensor(keys, dtype=torch.int32, device=self.device),
            lengths.repeat_interleave(group),
            since=self.drafter.number if self.drafter else 0,
        )
        logits = self.trunk.logits(last).repeat_interleave(group, dim=0)[:, None]
        self._settle(rows, logits, last.repeat_interleave(group, dim=0)[:, None], None, self._noise(rows, 1))
        return rows

    def _retire(self) -> None:
        """Count the rows that ended. They leave when they are an eighth of the batch, since moving the caches at each
        end would cost more."""
        live = self._count()
        if 0 < self.held <= len(live.alive) * 7 // 8:
            self._keep((live.alive | live.waits).nonzero()[:, 0])

    def _keep(self, rows: Tensor) -> None:
        """These rows stay, and the others leave."""
        assert self.live is not None
        self.live = self.live.select(rows)
        self.cache.select(rows)
        if self.drafter:
            self.drafter.select(self.live, rows)

    def _count(self) -> Rows:
        """Find the rows that ended. What the host has to know of a round is read in one copy."""
        live = self.live
        assert live is not None
        left = self.limit(live) - live.count
        live.alive = live.alive & ~self.results.stopped[live.index] & (left > 0)
        latents = getattr(self.cache, "latents", self.cache)
        numbers = [live.alive.sum(), live.waits.sum()]
        if isinstance(latents, LatentCache):
            numbers.append(latents.lengths_R.max())
        if self.drafter:
            numbers += [left.where(live.alive, 0).max(), *self.drafter.sizes(live)]
        read = torch.stack(numbers).tolist()
        if self.drafter:
            *read, self.most_left, unread, longest = read
            self.drafter.known = unread, longest
        if isinstance(latents, LatentCache):
            latents.known_longest = read.pop()
        self.alive, waits = read
        self.held = self.alive + waits
        self.ended_rows = self.admitted - self.held
        return live

    # ---- one round ----------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Draft k tokens for each row, verify them in one forward of the trunk, and refill the places of ended rows."""
        live = self.live
        assert live is not None
        waits = bool(self.waiting) or self.held > self.alive  # a graph takes rows without a shared prompt, to the end
        eager = waits or self.strings is not None  # a stop string is in no graph
        rounds = self.rounds if not eager and self.rounds and self.rounds.pays(live, self.cache) else None
        drafted, kept = self._forward_by_graph(live, rounds) if rounds else self._forward(live)
        self.drafts.add_cost(self.alive, drafted, kept, by_graph=rounds is not None)
        self._advance(live, kept)
        self._retire()
        self._refill()

    def _advance(self, live: Rows, kept_R: Tensor) -> None:
        """The cache keeps what the rows keep of the round."""
        self.cache.advance(kept_R)

    def _graph_depth(self, live: Rows) -> int:
        return self.drafts.of_graph(live)

    def _forward(self, live: Rows) -> tuple[Drafted | None, Tensor]:
        depth = self._plan(live)
        noise = self._noise(live, depth + 1)
        drafted = self.drafts.draft(live, depth, noise, self.temperature(live))
        inputs = torch.cat([live.last[:, None], drafted.tokens_RK], dim=1) if drafted else live.last[:, None]
        positions = (live.prompt_length - 1)[:, None] + (live.count[:, None] + self.steps[: depth + 1])
        positions = positions.clamp(max=self.decoder.context - 1)  # no token past the context is kept
        hidden, logits, routing = self._read_tokens(inputs, positions)
        if routing is not None:
            self.results.add_routing(live, routing, depth + 1)
        self.results.add_forward(live, drafted)
        return drafted, self._settle(live, logits, hidden, drafted, noise)

    def _read_tokens(self, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The hidden states [R, S, D] and the logits [R, S, V] after these tokens, and their routing, if recorded."""
        hidden = self.trunk(inputs, positions, self.cache)
        return hidden, self.trunk.logits(hidden), self.trunk.routing() if self.params.record_routing else None

    def _forward_by_graph(self, live: Rows, rounds: Rounds) -> tuple[Drafted | None, Tensor]:
        depth = self._graph_depth(live)
        if depth:
            self.drafts.catch_up(live, rounds.fits(live, depth))
        limits = {"limit": self.limit(live), "temperature": self.temperature(live), "start": self.start(live)}
        tokens = rounds(live, self.cache, self.drafter, depth, **limits)
        if tokens is None:
            self.rounds = None
            return self._forward(live)
        drafted = None if tokens.drafts is None else Drafted(tokens.drafts)
        self.results.add_forward(live, drafted)
        return drafted, self._take(live, tokens, drafted)

    def _plan(self, live: Rows) -> int:
        """Tells how many tokens are drafted next: at most what the row with the most room can still use."""
        if not self.drafts.max_depth:
            return 0
        return self.drafts.plan(live, self.alive, self.most_left - 1)

    def _noise(self, rows: Rows, places: int) -> Noise:
        positions = self.start(rows) + rows.count[:, None] + self.steps[:places]
        return Noise(rows.keys_R2[:, None], positions, self.vocabulary)

    def _settle(
        self, live: Rows, logits_RSV: Tensor, hidden_RSD: Tensor, drafted: Drafted | None, noise: Noise
    ) -> Tensor:
        """Choose tokens, keep those up to the first draft that fails, and return how many each row kept [R]."""
        targets, logprobs, accepted = self._choose(live, logits_RSV, drafted, noise)
        left = self.limit(live) - live.count if drafted else 1
        kept, stopped = until_end(targets, accepted, live.alive, left, self.stops)
        tokens = Tokens(targets, logprobs, hidden_RSD, kept, stopped, accepted=accepted)
        if self.strings is not None:
            tokens.kept, tokens.cut = self._until_strings(live, tokens)
            tokens.stopped = stopped | tokens.cut
        return self._take(live, tokens, drafted)

    def _take(self, live: Rows, tokens: Tokens, drafted: Drafted | None) -> Tensor:
        """Note what was chosen. Returns how many tokens each row kept [R], which are none where one is not finite."""
        logprobs, kept, stopped = tokens.logprobs, tokens.kept, tokens.stopped
        if self.aborts:
            past_RS = self.steps[: logprobs.shape[1]] >= kept[:, None]
            finite = (past_RS | (logprobs > -torch.inf)).all(1)  # of numbers that are not above 0
            self.results.aborted[live.index] |= ~finite
            live.alive, kept, stopped = live.alive & finite, kept * finite, stopped & finite
        count = self.results.add(live, tokens.targets, logprobs, kept, stopped, tokens.cut)
        if drafted and tokens.accepted is not None:
            self.results.add_drafts(live, drafted, tokens.accepted, kept)
            self.drafts.observe(live, self.alive, drafted, tokens.accepted)
        live.last = tokens.targets[:, 0]
        if drafted:
            live.last = tokens.targets.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        live.count = count
        self.drafts.keep(live, tokens.targets, tokens.hidden, kept)
        return kept

    def _choose(
        self, live: Rows, logits_RSV: Tensor, drafted: Drafted | None, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens [R, S] and their log-probabilities [R, S], and how many drafts of each row are accepted [R]."""
        temperature, new = self.temperature(live), logits_RSV.shape[1]
        if isinstance(temperature, Tensor):
            temperature = temperature.repeat_interleave(new)
        flat = logits_RSV.flatten(0, 1)
        targets, logprobs = (x.view(-1, new) for x in choose(flat, temperature, noise.flatten()))
        if drafted is None:
            return targets, logprobs, None
        if drafted.confident_RK is None:
            return targets, logprobs, verify_draft(targets, drafted.tokens_RK)
        accepted = drafted.confident_RK.long().cumprod(1).sum(1)
        targets = torch.where(self.steps[:new] < accepted[:, None], F.pad(drafted.tokens_RK, (0, 1)), targets)
        return targets, logprobs_of(flat, targets.flatten(), temperature).view(-1, new), accepted

    def _until_strings(self, live: Rows, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Tells how many tokens each row keeps [R] up to its first stop string, and which rows [R] end with one."""
        kept, cut = tokens.kept.tolist(), [False] * len(tokens.kept)
        rows = zip(*(x.tolist() for x in (live.index, live.count, tokens.targets, tokens.stopped)), strict=True)
        for i, (index, count, targets, stopped) in enumerate(rows):
            new, strings = targets[: kept[i] - stopped], self.stop_strings(index)  # a stop token is no text
            if not new or strings is None:
                continue
            end = strings.end([*self.results.token_ids[index, :count].tolist(), *new], count)
            if end is not None:
                kept[i], cut[i] = end - count, True
        return torch.tensor(kept, device=self.device), torch.tensor(cut, device=self.device)
