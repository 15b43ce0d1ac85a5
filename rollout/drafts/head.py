"""The draft head's part in decoding a shard: what it has read of each row, and what it drafts next.

One row, whose prompt is p, over five rounds; the fourth makes two drafts d1 d2, of which d1 is right:

    round                 prefill  1        2        3        4                5
    the row gets          a1       a2       a3       a4       d1 = a5, a6      a7
    `prefilled`           p        p        p        p        -                -
    `unread`              a1       a1 a2    a1 to a3 a1 to a4 a5 a6            a5 to a7
    the head's cache has  -        -        -        -        p a1 to a4       p a1 to a4

The head reads what is unread when it next drafts (`_catch_up`), then drafts one token after the other. What it adds to
its cache meanwhile is rolled back: accepted or not, those entries follow from its own states and not from the trunk's.
`Rows.unread` is the number of unread tokens of each row, `known` what the host has read of these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.decoding.latent_cache import LatentCache
from rollout.backends import Decoder
from rollout.drafts.speculative import confident_drafts
from rollout.rows import Prefilled, Rows
from rollout.sampling import Noise, SamplingParams, pick

MOST_HELD = 4  # times what the live rows have unread


@dataclass
class Unread:
    """S tokens that rows got at once, of which each kept the first `kept_R`, and the states that precede them.
    `before_R` other tokens of the row were unread already."""

    number: int
    index_R: Tensor
    before_R: Tensor
    tokens_RS: Tensor
    hidden_RSD: Tensor
    kept_R: Tensor


class Drafter:
    """A draft head that never drafts reads nothing; one that drafts again first reads what was verified since.

    `room`: most tokens that a row may write; `longest`: those of the longest prompt; `most_new`: most of a round.
    """

    def __init__(self, decoder: Decoder, params: SamplingParams, room: int, longest: int, most_new: int) -> None:
        assert decoder.head is not None
        self.head, self.vocabulary, self.context = decoder.head, decoder.draft_vocabulary, decoder.context
        self.params, self.room, self.longest, self.most_new = params, room, longest, most_new
        self.steps = torch.arange(room, device=self.head.trunk.device)
        self.cache: LatentCache | None = None  # None until something is drafted
        self.prefilled: list[Prefilled] = []
        self.unread: list[Unread] = []  # moved nowhere until the draft head reads them, since it may never do
        self.number = 0  # of the next of them
        # The most unread tokens of a row, and the longest row of the cache once they are read, where the host knows.
        self.known: tuple[int, int] | None = None

    # ---- rows come and go ---------------------------------------------------------------------------------------

    def add_prompts(self, prefilled: Prefilled) -> None:
        """Adds rows of these prompts after the live ones."""
        if self.cache is None:
            self.prefilled.append(prefilled)
        else:
            self.cache = self.cache.join([self._read(prefilled)])

    def select(self, live: Rows, kept_R: Tensor) -> None:
        """Keep the rows `kept_R`, which `live` are now. What the others had is dropped when it is most of what is
        held."""
        self.known = None
        if self.cache is not None:
            self.cache.select(kept_R)
        numbers_R = live.index // self.params.group_size
        prefilled = [_of_rows(part, numbers_R) for part in self.prefilled]
        self.prefilled = [part for part in prefilled if len(part.numbers_P)]
        if sum(part.tokens_RS.numel() for part in self.unread) > MOST_HELD * int(live.unread.sum()):
            tokens_RS, hidden_RSD = self.take_unread(live, int(live.unread.max()))
            none = torch.zeros_like(live.unread)
            self.unread = [Unread(self.number, live.index, none, tokens_RS, hidden_RSD, live.unread)]
            self.number += 1

    def forget(self) -> None:
        """Drop everything: no row is live any more."""
        self.cache, self.prefilled, self.unread = None, [], []

    def add_unread(self, live: Rows, tokens_RS: Tensor, hidden_RSD: Tensor, kept_R: Tensor) -> None:
        """The first `kept_R` of these tokens were verified; `hidden_RSD` are the states that precede them."""
        self.unread.append(Unread(self.number, live.index, live.unread, tokens_RS, hidden_RSD, kept_R))
        self.number += 1
        live.unread, self.known = live.unread + kept_R, None

    def sizes(self, live: Rows) -> list[Tensor]:
        """Gives what `known` holds, as the device has it. Prompts that are yet to be read have no entries."""
        after = live.unread if self.cache is None else self.cache.lengths_R + live.unread
        return [live.unread.max(), after.max()]

    def missed(self, live: Rows) -> int:
        """Counts the tokens that the draft head has to read before it can draft, other than what a round may give a
        row. Prompts are about those of the rows."""
        prompts = sum(part.token_ids_PT.numel() for part in self.prefilled)
        count = sum(len(part.numbers_P) for part in self.prefilled)
        rows = int((live.unread - self.most_new).clamp(min=0).sum())
        return rows + prompts * min(len(live.index), count) // max(count, 1)

    def take_unread(self, live: Rows, width: int) -> tuple[Tensor, Tensor]:
        """Takes what the draft head reads now: tokens [R, width], states [R, width, D], `live.unread` of each row."""
        held, self.unread = self.unread, []
        if len(held) == 1 and held[0].index_R is live.index:  # the round before drafted, and no row left
            more = width - held[0].tokens_RS.shape[1]
            return F.pad(held[0].tokens_RS, (0, more)), F.pad(held[0].hidden_RSD, (0, 0, 0, more))
        place = live.index.new_full((1 + int(torch.cat([live.index, *(part.index_R for part in held)]).max()),), -1)
        place[live.index] = live.every
        tokens = live.index.new_zeros(len(live.index), width)
        hidden = held[0].hidden_RSD.new_zeros(len(live.index), width, held[0].hidden_RSD.shape[-1])
        for size in {part.tokens_RS.shape[1] for part in held}:
            parts = [part for part in held if part.tokens_RS.shape[1] == size]
            number_R = torch.cat([torch.full_like(part.index_R, part.number) for part in parts])
            row_R = place[torch.cat([part.index_R for part in parts])]
            same_R = (row_R >= 0) & (live.since[row_R] <= number_R)  # another row may have had this index before
            kept_R = torch.cat([part.kept_R for part in parts]) * same_R
            of, at = (self.steps[:size] < kept_R[:, None]).nonzero(as_tuple=True)
            to = row_R[of], torch.cat([part.before_R for part in parts])[of] + at
            tokens[to] = torch.cat([part.tokens_RS for part in parts])[of, at]
            hidden[to] = torch.cat([part.hidden_RSD for part in parts])[of, at]
        return tokens, hidden

    # ---- drafting -----------------------------------------------------------------------------------------------

    def draft(self, live: Rows, depth: int, noise: Noise, temperature: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts [R, k] of the draft head, chosen with the same noise that the trunk's choice will use; with
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
        """Read what was verified since the last draft; returns the output for each row's newest token [R, D]."""
        width, longest = self.known if self.known and self.cache else (int(live.unread.max()), None)
        out = self._read_tokens(live, *self.take_unread(live, width))
        self.ready(live).advance(live.unread, longest)
        out = out[live.every, live.unread - 1]
        live.unread, self.known = torch.zeros_like(live.unread), None
        return out

    def read_ahead(self, live: Rows) -> None:
        """Read all that is unread but the newest token of each row."""
        tokens, hidden = self.take_unread(live, int(live.unread.max()))
        self._read_tokens(live, tokens, hidden)
        last_R = (live.unread - 1).clamp(min=0)
        self.ready(live).advance(last_R)
        newest = live.every[:, None], last_R[:, None]
        live.unread, self.known = live.unread - last_R, None
        none = torch.zeros_like(live.unread)
        self.unread = [Unread(self.number, live.index, none, tokens[newest], hidden[newest], live.unread)]
        self.number += 1

    def _read_tokens(self, live: Rows, tokens_RS: Tensor, hidden_RSD: Tensor) -> Tensor:
        """The draft head's output after each of the unread tokens [R, S, D]. The caller advances the cache."""
        positions = (live.prompt_length + live.count - live.unread)[:, None] + self.steps[: tokens_RS.shape[1]]
        return self.head(tokens_RS, hidden_RSD, self._clamp(positions), self.ready(live))

    def ready(self, live: Rows) -> LatentCache:
        """The cache, which holds the prompts of the live rows."""
        if self.cache is None:
            self.cache = self._read_prompts(live)
        return self.cache

    def _clamp(self, positions: Tensor) -> Tensor:
        """Limits positions to the context: a block may reach past it, where no token is kept."""
        return positions.clamp(max=self.context - 1)

    def _read_prompts(self, live: Rows) -> LatentCache:
        """Let the draft head read the prompts of the rows that are still live, before its first draft."""
        group = self.params.group_size
        numbers_R = live.index // group
        caches, parts = [], []
        for prefilled in self.prefilled:
            needed = torch.isin(prefilled.numbers_P, numbers_R)
            if bool(needed.any()):
                chosen = prefilled.select(needed)
                caches.append(self._read(chosen))
                parts.append(chosen.numbers_P)
        self.prefilled = []
        numbers = torch.cat(parts)
        place = torch.zeros(int(numbers.max()) + 1, dtype=torch.long, device=numbers.device)
        place[numbers] = torch.arange(len(numbers), device=numbers.device)
        cache = caches[0].join(caches[1:])
        cache.select(place[numbers_R] * group + live.index % group)
        return cache

    def _read(self, prompts: Prefilled) -> LatentCache:
        head, (count, longest) = self.head, prompts.token_ids_PT.shape
        if prompts.heads:
            cache = prompts.heads[0].join(prompts.heads[1:], longest + self.room)
            positions = cache.lengths_R[:, None] + torch.arange(longest - 1, device=head.trunk.device)
            head(prompts.token_ids_PT[:, 1:], prompts.hidden_PTD[:, :-1], self._clamp(positions), cache)
            cache.advance(prompts.lengths_P - 1)
            return cache
        cache = head.cache(count, longest)
        positions = torch.arange(longest, device=head.trunk.device).expand(count, -1)
        head(prompts.token_ids_PT, F.pad(prompts.hidden_PTD, (0, 0, 1, 0))[:, :-1], positions, cache)
        cache.advance(prompts.lengths_P)
        return cache.fan_out(self.params.group_size, self.room, self.longest)


def _of_rows(prefilled: Prefilled, numbers_R: Tensor) -> Prefilled:
    """Without the prompts that no row continues, if they are most of it or all: to move the others has a cost."""
    needed_P = torch.isin(prefilled.numbers_P, numbers_R)
    most = len(needed_P) > MOST_HELD * int(needed_P.sum())
    return prefilled.select(needed_P) if most else prefilled
