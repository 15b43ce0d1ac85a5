"""What rounds of decoding cost on this machine, by live rows and drafts: a table that is measured once per run."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

from policies.files.atomic import write_file
from rollout.sampling import SamplingParams

MAX_DEPTH = 8
GRAPH_DEPTHS = (0, 1, 3)  # of compiled rounds: each depth is a graph, which takes a minute to compile
FEW_ROWS = 8  # that graphs decode which are for one number of rows each
MOST_ROWS = 32  # that a graph decodes which takes any number; with more the products are what takes the time
PROMPT_TOKENS = 96  # length of the prompt when rounds are timed


@dataclass(frozen=True)
class Workload:
    """What is decoded, as far as the cost of a round depends on it: at most `rows` live rows, and so many tokens of a
    completion. `graphs`: tokens of the longest sequence that graphs decode; 0 where they decode none."""

    rows: int
    completion_tokens: int = 512
    graphs: int = 0

    @classmethod
    def of(cls, params: SamplingParams, rows: int, longest_prompt: int = PROMPT_TOKENS) -> Workload:
        """Gives the workload of these parameters.

        >>> Workload.of(SamplingParams(max_completion_tokens=200, compiled=True), rows=64)
        Workload(rows=64, completion_tokens=200, graphs=296)
        """
        graphs = longest_prompt + params.max_completion_tokens if params.compiled else 0
        return cls(rows, params.max_completion_tokens, graphs)


@dataclass(frozen=True)
class CostTable:
    """What rounds cost: `rounds[i][k]` are the milliseconds of one with `rows[i]` live rows that makes k drafts each
    and verifies them.

    `graphs`: the same of compiled rounds, for as many of the first `rows` as graphs decode.
    `reading`: milliseconds in which the draft head reads a token that it has missed; 0 where that was not measured.
    Costs are linear between two numbers of rows and constant outside. A depth that was not measured costs infinity.

    >>> CostTable(rows=[1, 3], rounds=[[10.0, 12.0], [20.0, 28.0]]).milliseconds(2, 1)
    20.0
    """

    rows: list[int]
    rounds: list[list[float]]
    graphs: list[list[float]] | None = None
    reading: float = 0.0

    @property
    def max_depth(self) -> int:
        return max(map(len, self.rounds)) - 1

    def milliseconds(self, rows: int, depth: int, by_graph: bool = False) -> float:
        rounds = self.graphs if by_graph else self.rounds
        if rounds is None:
            return math.inf
        right = min(bisect_left(self.rows, rows), len(rounds) - 1)
        left = right - 1 if right and rows < self.rows[right] else right
        if depth >= min(len(rounds[left]), len(rounds[right])):
            return math.inf
        span = max(self.rows[right] - self.rows[left], 1)
        share = min(max((rows - self.rows[left]) / span, 0.0), 1.0)
        return (1 - share) * rounds[left][depth] + share * rounds[right][depth]

    def _check(self) -> None:
        """Raises TypeError or ValueError for a table in which no cost can be looked up."""
        tables = [self.rounds, *([] if self.graphs is None else [self.graphs])]
        if (
            any(not 0 < len(self.rows) == len(table) for table in tables if table is not self.graphs)
            or (self.graphs is not None and not 0 < len(self.graphs) <= len(self.rows))
            or self.rows != sorted(set(self.rows))
            or self.rows[0] < 1
        ):
            raise ValueError("rows must ascend from 1 or more, with rounds for each")
        if type(self.reading) not in (int, float) or not 0 <= float(self.reading) < math.inf:
            raise ValueError("the milliseconds of reading must be 0 or more and finite")
        for costs in (costs for table in tables for costs in table):
            if not costs or not all(type(cost) in (int, float) and 0 < float(cost) < math.inf for cost in costs):
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
        except (TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is no table of draft costs ({error}); delete it to measure again") from None
