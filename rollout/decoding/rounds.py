"""One round of the rows of a batch: without drafts, with drafts that one forward of the trunk verifies, or as a graph.

Axes: R live rows, K drafts, S = K + 1 tokens of a verifying forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rollout.decoding.batch import Batch
from rollout.rows import Drafted, Tokens
from rollout.sampling import Noise

if TYPE_CHECKING:
    from rollout.compiled.rounds import Rounds


class Round(Protocol):
    def decode(self, batch: Batch) -> Tokens | None:
        """Give each live row its next tokens, and note them. None where this round cannot be had."""
        ...


class PlainRound:
    """Each live row gets one token."""

    def decode(self, batch: Batch) -> Tokens:
        return verify(batch, None, batch.noise(batch.live, 1))


@dataclass(frozen=True)
class DraftedRound:
    """The draft head makes `depth` drafts of each row. A row gets those that are accepted, and one token more."""

    depth: int

    def decode(self, batch: Batch) -> Tokens:
        rows, noise = batch.live, batch.noise(batch.live, self.depth + 1)
        batch.reader.part_rows()
        drafted = batch.drafts.draft(rows, self.depth, noise, batch.settings.temperature(rows))
        return verify(batch, drafted, noise)


@dataclass(frozen=True)
class GraphRound:
    """The same as one compiled graph, with `depth` drafts or none."""

    rounds: Rounds
    depth: int

    def decode(self, batch: Batch) -> Tokens | None:
        rows, settings = batch.live, batch.settings
        batch.reader.part_rows()
        if self.depth:
            batch.drafts.catch_up(rows, self.rounds.fits(rows, self.depth))
        tokens = self.rounds(
            rows,
            batch.reader.cache,
            batch.drafts.head,
            self.depth,
            limit=settings.limit(rows),
            temperature=settings.temperature(rows),
            start=settings.start(rows),
        )
        if tokens is not None:
            batch.results.add_forward(rows, tokens.drafted)
            batch.postprocess.note(rows, tokens)
        return tokens


def verify(batch: Batch, drafted: Drafted | None, noise: Noise) -> Tokens:
    """One forward of the trunk over each row's newest token and its drafts, and what follows from the logits."""
    rows, steps = batch.live, batch.results.steps
    inputs_RS = rows.last[:, None]
    if drafted:
        inputs_RS = torch.cat([inputs_RS, drafted.tokens_RK], dim=1)
    new = inputs_RS.shape[1]
    positions_RS = (rows.prompt_length - 1)[:, None] + (rows.count[:, None] + steps[:new])
    positions_RS = positions_RS.clamp(max=batch.decoder.context - 1)  # no token past the context is kept
    hidden, logits, routing = batch.reader.read(rows, inputs_RS, positions_RS, some_wait=batch.counts.waits > 0)
    if routing is not None:
        batch.results.add_routing(rows, routing, new)
    batch.results.add_forward(rows, drafted)
    return batch.postprocess.choose(rows, logits, hidden, drafted, noise)
