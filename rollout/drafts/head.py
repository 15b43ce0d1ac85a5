"""The draft head's part in decoding a shard: what it has read of each row, and what it drafts next."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.decoding.latent_cache import LatentCache
from rollout.backends import Decoder
from rollout.drafts.speculative import confident_drafts
from rollout.rows import Prefilled, Rows
from rollout.sampling import Noise, SamplingParams, pick


class Drafter:
    """A head that never drafts reads nothing; one that drafts again first reads what was verified since.

    `room`: most tokens that a row may write; `longest`: tokens of the longest prompt.
    """

    def __init__(self, decoder: Decoder, params: SamplingParams, room: int, longest: int) -> None:
        assert decoder.head is not None
        self.head, self.vocabulary, self.context = decoder.head, decoder.draft_vocabulary, decoder.context
        self.params, self.room, self.longest = params, room, longest
        self.steps = torch.arange(room, device=self.head.trunk.device)
        self.cache: LatentCache | None = None  # None until something is drafted
        self.prefilled: list[Prefilled] = []

    # ---- rows come and go ---------------------------------------------------------------------------------------

    def hold(self, prefilled: Prefilled) -> None:
        """Rows of these prompts are added after the live ones."""
        if self.cache is None:
            self.prefilled.append(prefilled)
        else:
            self.cache = self.cache.join([self._read(prefilled)])

    def select(self, kept_R: Tensor) -> None:
        if self.cache is not None:
            self.cache.select(kept_R)

    def forget(self) -> None:
        """Drop everything: no row is live any more."""
        self.cache, self.prefilled = None, []

    def keep(self, live: Rows, tokens_RS: Tensor, hidden_RSD: Tensor, kept_R: Tensor) -> None:
        """The first `kept_R` of these tokens were verified; `hidden_RSD` are the states that precede them."""
        rows, at = live.every[:, None], live.unread[:, None] + self.steps[: tokens_RS.shape[1]]
        at = at.clamp(max=live.unread_tokens.shape[1] - 1)  # nothing is kept there
        live.unread_tokens[rows, at], live.unread_hidden[rows, at] = tokens_RS, hidden_RSD
        live.unread = live.unread + kept_R

    # ---- drafting -----------------------------------------------------------------------------------------------

    def draft(self, live: Rows, depth: int, noise: Noise, temperature: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts [R, k] of the head, chosen with the same noise that the trunk's choice will use; with
        `accept: margin` also which of them are taken unverified [R, k]."""
        drafts, confident = [], []
        out = self._catch_up(live)
        assert self.cache is not None
        for d in range(depth):
            logits = self.head.logits(out)
            drafts.append(pick(logits, temperature, noise.at(d), self.vocabulary))
            if self.params.accept == "margin":
                confident.append(confident_drafts(logits, temperature, self.params.margin))
            if d + 1 < depth:
                position = (live.prompt_length + live.count + d)[:, None]
                out = self.head(drafts[-1][:, None], out[:, None], self._clamp(position), self.cache)[:, 0]
                self.cache.advance(1)
        self.cache.advance(1 - depth)  # accepted or not, a chain is rolled back: its entries are not those of depth 1
        return torch.stack(drafts, dim=1), torch.stack(confident, dim=1) if confident else None

    def _catch_up(self, live: Rows) -> Tensor:
        """Read what was verified since the last draft; returns the head's output for each row's newest token [R, D]."""
        cache, new = self.ready(live), int(live.unread.max())
        positions = (live.prompt_length + live.count - live.unread)[:, None] + self.steps[:new]
        out = self.head(live.unread_tokens[:, :new], live.unread_hidden[:, :new], self._clamp(positions), cache)
        cache.advance(live.unread)
        out = out[live.every, live.unread - 1]
        live.unread = torch.zeros_like(live.unread)
        return out

    def ready(self, live: Rows) -> LatentCache:
        """The cache, which holds the prompts of the live rows."""
        if self.cache is None:
            self.cache = self._read_prompts(live)
        return self.cache

    def _clamp(self, positions: Tensor) -> Tensor:
        """A block may reach past the context, where no token is kept."""
        return positions.clamp(max=self.context - 1)

    def _read_prompts(self, live: Rows) -> LatentCache:
        """Before its first draft the head reads the prompts of the rows that are still live."""
        group = self.params.group_size
        numbers_R = live.index // group
        caches, kept = [], []
        for prefilled in self.prefilled:
            needed = torch.isin(prefilled.numbers_P, numbers_R)
            if bool(needed.any()):
                chosen = Prefilled(**{name: value[needed] for name, value in vars(prefilled).items()})
                caches.append(self._read(chosen))
                kept.append(chosen.numbers_P)
        self.prefilled = []
        numbers = torch.cat(kept)
        place = torch.zeros(int(numbers.max()) + 1, dtype=torch.long, device=numbers.device)
        place[numbers] = torch.arange(len(numbers), device=numbers.device)
        cache = caches[0].join(caches[1:])
        cache.select(place[numbers_R] * group + live.index % group)
        return cache

    def _read(self, prompts: Prefilled) -> LatentCache:
        head, (count, longest) = self.head, prompts.token_ids_PT.shape
        cache = head.cache(count, longest)
        positions = torch.arange(longest, device=head.trunk.device).expand(count, -1)
        head(prompts.token_ids_PT, F.pad(prompts.hidden_PTD, (0, 0, 1, 0))[:, :-1], positions, cache)
        cache.advance(prompts.lengths_P)
        return cache.fan_out(self.params.group_size, self.room, self.longest)
