"""Decoding episodes: a row that ends a turn waits for its tools, and goes on in its place after what they wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rollout.backends import Decoder
from rollout.decoding.shard import Decoding
from rollout.drafts.drafts import Drafted
from rollout.environments.episodes import Episodes
from rollout.group import Prompt
from rollout.rows import Rows
from rollout.sampling import SamplingParams


class EpisodeDecoding(Decoding):
    """Decodes the episodes of one shard. Rows wait for their tools while the others are decoded."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], params: SamplingParams, episodes: Episodes) -> None:
        self.episodes = episodes
        super().__init__(decoder, prompts, params)

    def _count(self) -> Rows:
        """Find the rows that ended, and ask the environments of those that ended a turn. The tools are waited for when
        an eighth of the rows waits: by counts, and never by a clock."""
        live = self._ask()
        while 0 < (self.held - self.alive) * 8 >= self.alive:
            self._go_on(live)
            live = self._ask()
        return live

    def _ask(self) -> Rows:
        live = self.live
        assert live is not None
        ends_turn = live.alive & self.results.stopped[live.index] & ~self.results.cut[live.index]
        rows = ends_turn.nonzero()[:, 0]
        ended = {int(i): self.results.token_ids[i, : self.results.counts[i]].tolist() for i in live.index[rows]}
        live.waits[rows] = torch.tensor(self.episodes.ask(ended), dtype=torch.bool, device=self.device)
        return super()._count()

    def _forward(self, live: Rows) -> tuple[Drafted | None, Tensor]:
        states = getattr(self.cache, "states", None)
        if states is not None and self.held > self.alive:  # the states of rows that wait stay as they are
            states.new_R = (~live.waits).long()
        return super()._forward(live)

    def _go_on(self, live: Rows) -> None:
        """Wait for the tools. The rows whose episodes go on read what these wrote, and get their next token."""
        written, rows = self.episodes.written(), live.waits.nonzero()[:, 0].tolist()
        live.waits = torch.zeros_like(live.waits)
        reads = [(row, ids) for row in rows if (ids := written[int(live.index[row])]) is not None]
        while reads:
            size = max(1, self.prefill_tokens // (1 + max(len(ids) for _, ids in reads)))
            self._read(live, reads[:size])
            reads = reads[size:]

    def _read(self, live: Rows, reads: Sequence[tuple[int, list[int]]]) -> None:
        """One forward of these rows alone: their stop token, and the tokens that follow it."""
        rows = torch.tensor([row for row, _ in reads], device=self.device)
        new = torch.tensor([len(ids) for _, ids in reads], device=self.device)
        part, longest = live.select(rows), int(new.max())
        padded = [ids + [0] * (longest - len(ids)) for _, ids in reads]
        ids: Tensor = torch.tensor(padded, dtype=torch.long, device=self.device)  # also where no tool wrote anything
        inputs = torch.cat([self.results.token_ids[part.index, part.count - 1][:, None], ids], dim=1)
        positions = (part.prompt_length + part.count - 1)[:, None] + self.steps[: longest + 1]
        cache = self.cache.take(rows, new + 1)
        hidden = self.trunk(inputs, positions.clamp(max=self.decoder.context - 1), cache)
        if self.params.record_routing:
            self.results.add_routing(part, self.trunk.routing(), longest + 1)
        cache.advance(new + 1)
        self.cache.put(rows, cache)
        self.results.stopped[part.index] = False
        self.results.add(part, ids, torch.zeros_like(ids, dtype=torch.float32), new, torch.zeros_like(part.waits), None)
        self.drafts.keep(part, ids, hidden[:, :-1], new)
        part.count, part.alive = part.count + new, torch.ones_like(part.alive)
        last = hidden[part.every, new][:, None]
        self._settle(part, self.trunk.logits(last), last, None, self._noise(part, 1))
        live.put(rows, part)
