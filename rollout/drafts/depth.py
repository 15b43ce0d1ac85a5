"""How many tokens to draft before the next verification, 0 included, and what drafts have gained.

A draft is accepted only after every shallower one, so with conditional acceptances a_i a forward is expected to give
1 + Σ_{d≤k} Π_{i≤d} a_i tokens (Leviathan et al. 2023, eq. 1, there with one a for all depths). Its cost comes from a
table that is measured once per run and saved with it. The choice depends neither on a clock nor on the noise of the
tokens that are about to be drawn (contract 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rollout.cost_table import GRAPH_DEPTHS, CostTable

# Assumed of every depth before the first draft: ¾ are accepted, if nothing better is known.
PRIOR_ACCEPTED, PRIOR_DRAFTED = 3.0, 4.0
LEAST_GAIN = 1.2  # expected of drafts, else none are made: measured costs are a tenth off, and beginning costs more


@dataclass
class Patience:
    """Waits with something that saves time in each round, but costs time to begin. How many rounds follow is not known.

    So it begins once waiting has lost what beginning costs (the ski-rental rule; Karlin et al. 1988, section 2). The
    price is the lowest since waiting began: it grows with what is missed meanwhile, and falls when rows end.

    >>> patience = Patience()
    >>> [patience.over(price, lost=2.0) for price in (3.0, 4.0, 5.0, 6.0)]
    [False, False, True, False]
    """

    lost: float = 0.0
    price: float = math.inf

    def over(self, price: float, lost: float) -> bool:
        """Tells whether to begin now. If not, the next round loses `lost`. Both are milliseconds."""
        self.price = min(self.price, price)
        if self.lost >= self.price:
            self.lost, self.price = 0.0, math.inf
            return True
        self.lost += lost
        return False


class DepthController:
    """Chooses the depth for one shard, from the costs and from what share of the shard's own drafts was accepted.

    `costs` is None where the number of drafts is fixed: then nothing is chosen. `head_accepted`: what share of the
    drafts is believed to be accepted at each depth, before the shard has any.
    """

    def __init__(self, costs: CostTable | None, max_depth: int, head_accepted: Sequence[float] = ()) -> None:
        self.costs, self.max_depth = costs, min(max_depth, costs.max_depth) if costs else max_depth
        self.reached = [PRIOR_DRAFTED] * self.max_depth
        known = [share * PRIOR_DRAFTED for share in head_accepted[: self.max_depth]]
        self.accepted = known + [PRIOR_ACCEPTED] * (self.max_depth - len(known))
        self.known_speeds: dict[int, dict[int, float]] = {}  # of graphs, by rows, until something is observed

    def observe(self, rows: int, accepted: Sequence[int]) -> None:
        """Note that of `rows` rows with drafts `accepted[d]` accepted theirs at depth d + 1 and all before it."""
        self.known_speeds.clear()
        reached = rows
        for depth, count in enumerate(accepted):
            self.reached[depth] += reached
            self.accepted[depth] += count
            reached = count

    def tokens(self, depth: int) -> list[float]:
        """The tokens, by the number of drafts, 0 to `depth`, that a forward is expected to give a row."""
        chain, expected = 1.0, [1.0]
        for d in range(depth):
            chain *= self.accepted[d] / self.reached[d]
            expected.append(expected[-1] + chain)
        return expected

    def plain(self, rows: int) -> float:
        """Tokens a millisecond that a row gets without drafts."""
        assert self.costs is not None
        return 1 / self.costs.milliseconds(rows, 0)

    def graph_speeds(self, rows: int) -> dict[int, float]:
        """Tokens a millisecond that a row is expected to get from compiled rounds, by depth, up to `max_depth`."""
        assert self.costs is not None
        if rows not in self.known_speeds:  # a round of .8 ms notices the time that this takes
            depths = [depth for depth in GRAPH_DEPTHS if depth <= self.max_depth]
            expected, costs = self.tokens(depths[-1]), self.costs
            speeds = {k: expected[k] / costs.milliseconds(rows, k, by_graph=True) for k in depths}
            self.known_speeds[rows] = speeds
        return self.known_speeds[rows]

    def choose(self, rows: int, most: int) -> tuple[int, float]:
        """The depth, at most `most`, and the tokens a millisecond that a row is then expected to get.

        Nothing is drafted where that is expected to gain less than a fifth. Of two equal speeds that of fewer drafts is
        chosen.
        """
        assert self.costs is not None
        plain = self.plain(rows)
        best = 0, LEAST_GAIN * plain
        for depth, tokens in enumerate(self.tokens(min(self.max_depth, most))):
            speed = tokens / self.costs.milliseconds(rows, depth)
            if depth and speed > best[1]:
                best = depth, speed
        return best if best[0] else (0, plain)
