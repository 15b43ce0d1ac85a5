"""Decoding one shard: prefill each prompt once, then draft and verify until every row has ended.

Three prompts with a completion each, places for two rows, two drafts a round (d1, d2; + is the trunk's own token):

    round       prefill      1                  2              3
    row 0       p0 → a1      d1 d2 + → a2 a3 a4 d1 ✗ → a5      a6 = stop        leaves, p2 is admitted in its place
    row 1       p1 → b1      d1 ✗ → b2          d1 d2 + → ...  ...

    the trunk has read       p0 a1 a2 a3        a4             a5               all but the newest token of a row
    the host reads           RoundCounts        RoundCounts    RoundCounts      who is alive, how long rows are

Drafts that fail leave entries in the cache, which `advance` does not count: the next forward writes over them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollout.decoding.batch import Batch
from rollout.decoding.rounds import DraftedRound, GraphRound, PlainRound, Round

if TYPE_CHECKING:
    from rollout.compiled.rounds import Rounds


class Decoding:
    """Decodes a batch: call `decode_round` until `done`; `batch.groups()` has what was sampled.

    >>> decoding = Decoding(Batch(engine.decoder, prompts, SamplingParams(group_size=4)))
    >>> while not decoding.done:
    ...     decoding.decode_round()
    >>> groups = decoding.batch.groups()
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.graphs: Rounds | None = None
        if batch.params.compiled:
            from rollout.compiled.rounds import rounds_of

            self.graphs = rounds_of(batch.decoder, batch.params, batch.stops)
        batch.admit_waiting()

    @property
    def done(self) -> bool:
        return self.batch.ended == len(self.batch.results)

    def decode_round(self) -> None:
        """Give each live row its next tokens. Rows that end leave, and waiting prompts take their places."""
        batch, rows, alive = self.batch, self.batch.live, self.batch.counts.alive
        way = self.next_round()
        tokens = way.decode(batch)
        if tokens is None:  # a graph that cannot be had
            self.graphs = None
            way = self.next_round()
            tokens = way.decode(batch)
        assert tokens is not None
        batch.drafts.observe(rows, alive, tokens)
        batch.drafts.add_cost(alive, tokens, by_graph=isinstance(way, GraphRound))
        batch.reader.advance(rows, tokens.kept)
        batch.retire_ended()
        batch.admit_waiting()

    def next_round(self) -> Round:
        """The next round. It drafts no more tokens than the row with the most room can use."""
        batch, rows, counts = self.batch, self.batch.live, self.batch.counts
        # A graph takes rows without a shared prompt, to the end, and finds no stop string.
        eager = bool(batch.waiting) or counts.waits > 0 or batch.settings.any_stop_strings
        if self.graphs and not eager and self.graphs.pays(rows, batch.reader.cache):
            return GraphRound(self.graphs, batch.drafts.of_graph(rows))
        depth = batch.drafts.plan(rows, counts.alive, counts.most_left - 1)
        return DraftedRound(depth) if depth else PlainRound()
