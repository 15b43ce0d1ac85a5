"""The rows of episodes: one that ends a turn waits for its tools, and goes on in its place after what they wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rollout.backends import Decoder
from rollout.decoding.batch import Batch
from rollout.environments.episodes import Episodes
from rollout.group import Prompt
from rollout.sampling import SamplingParams


class EpisodeBatch(Batch):
    """The episodes of one shard. Rows wait for their tools while the others are decoded."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], params: SamplingParams, episodes: Episodes) -> None:
        super().__init__(decoder, prompts, params)
        self.episodes = episodes

    def count_rows(self) -> None:
        """Find the rows that ended, and ask the environments of those that ended a turn. The tools are waited for when
        an eighth of the rows waits: by counts, and never by a clock."""
        self._ask_tools()
        while 0 < self.counts.waits * 8 >= self.counts.alive:
            self._read_answers()
            self._ask_tools()

    def _ask_tools(self) -> None:
        rows = self.live
        ends_turn = rows.alive & self.results.stopped[rows.index] & ~self.results.cut[rows.index]
        asking = ends_turn.nonzero()[:, 0]
        ended = {int(i): self.results.token_ids[i, : self.results.counts[i]].tolist() for i in rows.index[asking]}
        rows.waits[asking] = torch.tensor(self.episodes.ask(ended), dtype=torch.bool, device=self.device)
        super().count_rows()

    def _read_answers(self) -> None:
        """Wait for the tools. The rows whose episodes go on read what these wrote, and get their next token."""
        rows, written = self.live, self.episodes.written()
        waiting = rows.waits.nonzero()[:, 0].tolist()
        rows.waits = torch.zeros_like(rows.waits)
        reads = [(row, ids) for row in waiting if (ids := written[int(rows.index[row])]) is not None]
        while reads:
            size = max(1, self.prefill_tokens // (1 + max(len(ids) for _, ids in reads)))
            self._read(reads[:size])
            reads = reads[size:]

    def _read(self, reads: Sequence[tuple[int, list[int]]]) -> None:
        """One forward of these rows alone: their stop token, and the tokens that follow it."""
        trunk, results = self.decoder.trunk, self.results
        rows = torch.tensor([row for row, _ in reads], device=self.device)
        new = torch.tensor([len(ids) for _, ids in reads], device=self.device)
        part, longest = self.live.select(rows), int(new.max())
        padded = [ids + [0] * (longest - len(ids)) for _, ids in reads]
        ids: Tensor = torch.tensor(padded, dtype=torch.long, device=self.device)  # also where no tool wrote anything
        inputs = torch.cat([results.token_ids[part.index, part.count - 1][:, None], ids], dim=1)
        positions = (part.prompt_length + part.count - 1)[:, None] + results.steps[: longest + 1]
        cache = self.reader.cache.take_rows(rows, new + 1)
        hidden = trunk(inputs, positions.clamp(max=self.decoder.context - 1), cache)
        if self.params.record_routing:
            results.add_routing(part, trunk.routing(), longest + 1)
        cache.advance(new + 1)
        self.reader.cache.put_rows(rows, cache)
        results.stopped[part.index] = False
        results.add(part, ids, torch.zeros_like(ids, dtype=torch.float32), new, torch.zeros_like(part.waits), None)
        self.drafts.add_verified(part, ids, hidden[:, :-1], new)
        part.count, part.alive = part.count + new, torch.ones_like(part.alive)
        last = hidden[part.every, new][:, None]
        self.postprocess.choose(part, trunk.logits(last), last, None, self.noise(part, 1))
        self.live.put(rows, part)
