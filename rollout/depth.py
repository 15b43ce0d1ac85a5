"""How many tokens to draft before the next verification, 0 included: as many as give the most tokens per millisecond.

A draft is accepted only after every shallower one, so with conditional acceptances a_i a forward is expected to give
1 + Σ_{d≤k} Π_{i≤d} a_i tokens (Leviathan et al. 2023, eq. 1, there with one a for all depths). Its cost comes from a
table that is measured once per run and saved with it. The choice depends neither on a clock nor on the noise of the
tokens that are about to be drawn (contract 4).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from policies.files.atomic import write_file

PRIOR_ACCEPTED, PRIOR_DRAFTED = 3.0, 4.0  # assumed of every depth before the first draft: ¾ are accepted
MAX_DEPTH = 8


@dataclass(frozen=True)
class CostTable:
    """`rounds[i][k]`: milliseconds of a round with `rows[i]` live rows that makes k drafts each and verifies them.

    Costs are linear between two numbers of rows and constant outside. A depth that was not measured costs infinity.

    >>> CostTable(rows=[1, 3], rounds=[[10.0, 12.0], [20.0, 28.0]]).milliseconds(2, 1)
    20.0
    """

    rows: list[int]
    rounds: list[list[float]]

    @property
    def max_depth(self) -> int:
        return max(len(costs) for costs in self.rounds) - 1

    def milliseconds(self, rows: int, depth: int) -> float:
        right = min(bisect_left(self.rows, rows), len(self.rows) - 1)
        left = right - 1 if right and rows < self.rows[right] else right
        if depth >= min(len(self.rounds[left]), len(self.rounds[right])):
            return math.inf
        span = max(self.rows[right] - self.rows[left], 1)
        share = min(max((rows - self.rows[left]) / span, 0.0), 1.0)
        return (1 - share) * self.rounds[left][depth] + share * self.rounds[right][depth]

    def _check(self) -> None:
        """Raises TypeError or ValueError for a table in which no cost can be looked up."""
        if not 0 < len(self.rows) == len(self.rounds) or self.rows != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError("rows must ascend from 1 or more, with rounds for each")
        for costs in self.rounds:
            if not costs or not all(0 < float(cost) < math.inf for cost in costs):
                raise ValueError("the milliseconds of a round must be above 0 and finite")
        if not all(type(rows) is int for rows in self.rows):
            raise ValueError("rows must be whole numbers")

    def save(self, path: Path) -> None:
        write_file(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Raises ValueError, which names the file, where it holds no such table."""
        try:
            table = cls(**json.loads(path.read_text()))
            table._check()
            return table
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is no table of draft costs ({error}); delete it to measure again") from None


class DepthController:
    """Chooses the depth for one shard, from the costs and from what share of the shard's own drafts was accepted."""

    def __init__(self, costs: CostTable, max_depth: int) -> None:
        self.costs, self.max_depth = costs, min(max_depth, costs.max_depth)
        self.reached = [PRIOR_DRAFTED] * self.max_depth
        self.accepted = [PRIOR_ACCEPTED] * self.max_depth

    def observe(self, rows: int, accepted: Sequence[int]) -> None:
        """Of `rows` rows, `accepted[d]` accepted their draft at depth d + 1 and every one before it."""
        reached = rows
        for depth, count in enumerate(accepted):
            self.reached[depth] += reached
            self.accepted[depth] += count
            reached = count

    def pick(self, rows: int, most: int) -> int:
        """The depth for the next forward of `rows` live rows, at most `most`. Of two equal ones it is the smaller."""
        best, best_speed = 0, 1 / self.costs.milliseconds(rows, 0)
        expected = chain = 1.0
        for depth in range(1, min(self.max_depth, most) + 1):
            chain *= self.accepted[depth - 1] / self.reached[depth - 1]
            expected += chain
            speed = expected / self.costs.milliseconds(rows, depth)
            if speed > best_speed:
                best, best_speed = depth, speed
        return best
