"""The drafts of a shard: how many are made before the next verification, and what becomes of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rollout.backends import Decoder
from rollout.cost_table import GRAPH_DEPTHS
from rollout.drafts.depth import DepthController, Patience
from rollout.drafts.head import Drafter
from rollout.group import RolloutGroup
from rollout.rows import Drafted, Prefilled, Rows, Tokens
from rollout.sampling import Noise, SamplingParams


class Drafts:
    """Plans how many tokens are drafted, drafts them, and notes what was accepted.

    `max_depth` is 0 and `head` is None where nothing can be drafted.
    """

    def __init__(self, decoder: Decoder, params: SamplingParams, longest: int, most_tokens: int | None = None) -> None:
        """`longest`: tokens of the longest prompt; `most_tokens`: of a completion, if not those of `params`."""
        has_head, costs = decoder.head is not None, decoder.costs
        self.device = decoder.trunk.device
        self.max_depth = params.draft_tokens or 0
        if params.draft_tokens is None and costs is not None and has_head:
            # Where graphs are wanted, more than they draft would only make all caches longer.
            self.max_depth = min(costs.max_depth, GRAPH_DEPTHS[-1]) if params.compiled else costs.max_depth
        self.fixed = params.draft_tokens is not None
        self.reading = Patience()  # what the draft head has missed
        self.controller = DepthController(None if self.fixed else costs, self.max_depth, params.head_accepted)
        # A forward writes k + 1 tokens after a row's end; only those that the row keeps are counted.
        self.room = (most_tokens or params.max_completion_tokens) + self.max_depth + 1
        self.head: Drafter | None = None
        if has_head and self.max_depth > 0:
            self.head = Drafter(decoder, params, self.room, longest, self.max_depth + 1)
        self.cost = self.plain_cost = 0.0  # of all rounds, in milliseconds

    def add_prompts(self, prefilled: Prefilled) -> None:
        """Adds rows of these prompts after the live ones."""
        if self.head:
            if self.head.cache is not None and (costs := self.controller.costs):  # else it may never read them
                self.cost += costs.reading * prefilled.token_ids_PT.numel()
            self.head.add_prompts(prefilled)

    def clear(self) -> None:
        """No row is live any more."""
        if self.head:
            self.head.forget()

    def add_verified(self, live: Rows, tokens_RS: Tensor, hidden_RSD: Tensor, kept_R: Tensor) -> None:
        """The first `kept_R` of these tokens were verified; `hidden_RSD` are the states that precede them."""
        if self.head:
            self.head.add_unread(live, tokens_RS, hidden_RSD, kept_R)

    def plan(self, live: Rows, alive: int, most: int) -> int:
        """Tells how many tokens are drafted next. `alive` of the rows go on; the one with the most room can still use
        `most` drafts. The draft head waits until drafting is worth what it has to read first."""
        if not self.head or most < 1:
            return 0
        if self.fixed:
            return min(self.max_depth, most)
        depth, speed = self.controller.choose(alive, most)
        missed = self.head.missed(live) if depth else 0
        waits = missed and not self._reads(missed, self.controller.plain(alive), speed)
        return 0 if waits else depth

    def of_graph(self, live: Rows) -> int:
        """Tells how many drafts a compiled round of these rows makes."""
        if not self.head:
            return 0
        if self.fixed:
            return self.max_depth
        speeds = self.controller.graph_speeds(len(live.index))
        depth = max(speeds, key=speeds.__getitem__)
        missed = self.head.missed(live) if depth else 0
        waits = missed and not self._reads(missed, speeds[0], speeds[depth])
        return 0 if waits else depth

    def _reads(self, missed: int, slower: float, speed: float) -> bool:
        """Tells whether the draft head reads the tokens that it has missed, and drafts. Both speeds are tokens a
        millisecond, without it and with it."""
        assert self.controller.costs is not None
        return self.reading.over(self.controller.costs.reading * missed, 1 / slower - 1 / speed)

    def draft(self, live: Rows, depth: int, noise: Noise, temperature: float | Tensor) -> Drafted:
        """Make so many drafts, as `plan` says. `temperature` is that of all rows, or of each [R]."""
        assert self.head is not None
        self.reading = Patience()  # it has missed nothing then
        self._add_reading(self.head, live)
        return Drafted(*self.head.draft(live, depth, noise, temperature))

    def catch_up(self, live: Rows, fits: bool) -> None:
        """Let the draft head read what it has missed before a compiled round with drafts, unless that `fits` into the
        round."""
        if self.head:
            self._add_reading(self.head, live)
            if not fits:
                self.head.read_ahead(live)

    def add_cost(self, alive: int, tokens: Tokens, by_graph: bool) -> None:
        """Add the cost of a round in which `alive` rows got these tokens."""
        if costs := self.controller.costs:
            cost = plain = costs.milliseconds(alive, 0, by_graph)
            if tokens.drafted:  # else each row got one token: a short round notices a sum
                measured = costs.milliseconds(alive, tokens.drafted.depth, by_graph)
                cost = measured if math.isfinite(measured) else plain  # of more rows than the table has
                plain *= int(tokens.kept.sum()) / alive
            self.cost, self.plain_cost = self.cost + cost, self.plain_cost + plain

    def with_costs(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """The costs of all rounds are shared by the completions, by how many forwards each took part in."""
        drafts = [completion.draft for group in groups for completion in group.completions]
        forwards = max(sum(draft.target_forwards for draft in drafts), 1)
        for draft in drafts:
            share = draft.target_forwards / forwards
            draft.cost, draft.plain_cost = round(self.cost * share, 3), round(self.plain_cost * share, 3)
        return groups

    def _add_reading(self, head: Drafter, live: Rows) -> None:
        if costs := self.controller.costs:
            self.cost += costs.reading * head.missed(live)

    def observe(self, live: Rows, alive: int, tokens: Tokens) -> None:
        """Tell the controller which drafts were accepted, in a round of `alive` rows."""
        if self.fixed or tokens.drafted is None or tokens.accepted is None:
            return  # there is nothing to choose
        steps = torch.arange(tokens.drafted.depth, device=self.device)
        agreed = (steps < tokens.accepted[:, None]) & live.alive[:, None]
        self.controller.observe(alive, agreed.sum(0).tolist())
