"""How many tokens to draft before the next verification, 0 included, and what drafts have gained.

A draft is accepted only after every shallower one, so with conditional acceptances a_i a forward is expected to give
1 + Σ_{d≤k} Π_{i≤d} a_i tokens (Leviathan et al. 2023, eq. 1, there with one a for all depths). Its cost comes from a
table that is measured once per run and saved with it. The choice depends neither on a clock nor on the noise of the
tokens that are about to be drawn (contract 4).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from policies.files.atomic import write_file
from rollout.group import Completion
from rollout.sampling import SamplingParams

# Assumed of every depth before the first draft: ¾ are accepted, if nothing better is known.
PRIOR_ACCEPTED, PRIOR_DRAFTED = 3.0, 4.0
MAX_DEPTH = 8
LEAST_GAIN = 1.2  # expected of drafts, else none are made: measured costs are a tenth off, and beginning costs more
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


def tokens_per_forward(completions: Iterable[Completion]) -> float | None:
    """Counts the tokens of a decoding forward of the trunk: 1 without drafts, 1 + Σ acceptance at depth d with them.

    It is None where no completion has more than its first token. Reading a tool's tokens gives the first token of the
    next turn, as reading the prompt gives that of the first turn.
    """
    tokens = forwards = 0
    for completion in completions:
        tokens += completion.num_sampled - completion.num_turns
        forwards += completion.draft.target_forwards
    return tokens / forwards if forwards else None


def draft_gain(completions: Iterable[Completion]) -> float | None:
    """Tells how much faster drafts made decoding, by the table of costs and not by a clock: 1 without any. It is None
    where there is no table.

    >>> from rollout.group import DraftStats
    >>> one = Completion([5, 6], [-0.1, -0.2], "", "stop", 0, draft=DraftStats(1, cost=8.0, plain_cost=10.0))
    >>> draft_gain([one])
    1.25
    """
    drafts = [completion.draft for completion in completions]
    cost = sum(draft.cost for draft in drafts)
    return sum(draft.plain_cost for draft in drafts) / cost if cost else None


def drafts_by_depth(completions: Iterable[Completion]) -> list[tuple[int, int]]:
    """Counts the drafts that were made at each depth, and those of them that were accepted."""
    drafts = [completion.draft for completion in completions]
    made = map(sum, zip_longest(*(draft.drafted for draft in drafts), fillvalue=0))
    accepted = map(sum, zip_longest(*(draft.accepted for draft in drafts), fillvalue=0))
    return list(zip(made, accepted, strict=True))


def head_accepted(completions: Iterable[Completion]) -> tuple[float, ...]:
    """Gives the share of the draft head's drafts that was accepted at each depth, where all before them were: what the
    next rollouts may expect. It is empty where the draft head has drafted nothing.

    >>> from rollout.group import DraftStats
    >>> one = Completion([5, 6], [-0.1, -0.2], "", "stop", 0, draft=DraftStats(9, drafted=[8, 4], accepted=[6, 2]))
    >>> head_accepted([one])  # 6/8, and (2/4) / (6/8)
    (0.75, 0.6667)
    """
    shares, before = list[float](), 1.0
    for drafted, accepted in drafts_by_depth(completions):
        if not drafted or not before:
            break
        shares.append(round(min(accepted / drafted / before, 1.0), 4))
        before = accepted / drafted
    return tuple(shares)
