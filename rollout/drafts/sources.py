"""The drafts of a shard: from the head and from what is looked up, each row from what is accepted more often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from rollout.backends import Decoder
from rollout.depth import GRAPH_DEPTHS, HEAD, DepthController, Kind, Patience
from rollout.drafts.head import Drafter
from rollout.drafts.lookup import Lookup
from rollout.group import Prompt, RolloutGroup
from rollout.rows import Prefilled, Rows
from rollout.sampling import Noise, SamplingParams

COUNTING = 0.002  # milliseconds in which Python counts a token of a text that drafts are looked up in


@dataclass(frozen=True)
class Plan:
    """What is drafted next. `kinds`: the best that each of the live rows can look up, by its place among the rows."""

    depth: int = 0
    head: bool = False
    kinds: dict[int, Kind] = field(default_factory=dict)


@dataclass
class Drafted:
    """Drafts [R, k], of which each row has `made_R`; the places after them are empty. Where it is None, none is.

    `confident_RK` are taken unverified (`accept: margin`). `kinds` has the kinds of rows with drafts that were looked
    up; the others have the head's, if the `head` has drafted.
    """

    tokens_RK: Tensor
    made_R: Tensor | None = None
    confident_RK: Tensor | None = None
    kinds: dict[int, Kind] = field(default_factory=dict)
    head: bool = False

    @property
    def depth(self) -> int:
        return self.tokens_RK.shape[1]

    @classmethod
    def nothing(cls, rows: int, depth: int, device: torch.device) -> Drafted:
        """Empty places alone."""
        none = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(none[:, None].repeat(1, depth), made_R=none)

    def by_source(self) -> dict[str, Tensor]:
        """Of every source but the head, which rows have its drafts [R]."""
        rows: dict[str, list[int]] = {}
        for row, (source, _) in self.kinds.items():
            rows.setdefault(source, []).append(row)
        of_row = torch.zeros(len(self.tokens_RK), dtype=torch.bool, device=self.tokens_RK.device)
        return {
            source: of_row.index_fill(0, torch.tensor(which, device=of_row.device), True)
            for source, which in rows.items()
        }


class Drafts:
    """Plans what is drafted, drafts it, and notes what was accepted.

    `max_depth` is 0 where nothing can be drafted. `head` and `lookup` are None where they are no sources.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], params: SamplingParams, longest: int) -> None:
        has_head = decoder.head is not None and "head" in params.draft_sources
        self.device, costs = decoder.trunk.device, decoder.costs
        self.max_depth = params.draft_tokens or 0
        if params.draft_tokens is None and costs is not None and (has_head or params.looks_up):
            # Where graphs are wanted, more than they draft would only make all caches longer.
            self.max_depth = min(costs.max_depth, GRAPH_DEPTHS[-1]) if params.compiled else costs.max_depth
        self.fixed = params.draft_tokens is not None
        self.reading, self.counting = Patience(), Patience()  # what the head has missed, and texts
        self.controller = DepthController(None if self.fixed else costs, self.max_depth, params.head_accepted)
        # A forward writes k + 1 tokens after a row's end; only those that the row keeps are counted.
        self.room = params.max_completion_tokens + self.max_depth + 1
        has_head = has_head and self.max_depth > 0
        self.head = Drafter(decoder, params, self.room, longest, self.max_depth + 1) if has_head else None
        looks_up = params.looks_up and self.max_depth > 0
        self.lookup = Lookup(prompts, params, len(decoder.trunk.embedding)) if looks_up else None
        self.cost = self.plain_cost = 0.0  # of all rounds, in milliseconds

    def begin(self, prefilled: Prefilled) -> None:
        """Rows of these prompts are added after the live ones."""
        if self.head:
            if self.head.cache is not None and (costs := self.controller.costs):  # else it may never read them
                self.cost += costs.reading * prefilled.token_ids_PT.numel()
            self.head.hold(prefilled)
        if self.lookup:
            for number in prefilled.numbers_P.tolist():
                self.lookup.begin(number)

    def keep(self, live: Rows, tokens_RS: Tensor, hidden_RSD: Tensor, kept_R: Tensor) -> None:
        """The first `kept_R` of these tokens were verified; `hidden_RSD` are the states that precede them."""
        if self.head:
            self.head.keep(live, tokens_RS, hidden_RSD, kept_R)
        if self.lookup:
            self.lookup.hold(live.index, tokens_RS, kept_R)

    def plan(self, live: Rows, alive: int, most: int) -> Plan:
        """`alive` of the rows go on; the one with the most room can still use `most` drafts."""
        if not self.max_depth or most < 1:
            return Plan()
        if self.lookup is None:
            depth = min(self.max_depth, most) if self.fixed else self._choose(live, alive, most, {})[0]
            return Plan(depth, head=depth > 0)
        saved = self.controller.may_save(alive, most, self.head is not None)
        if not saved:
            return Plan()
        if not self.fixed and not self.counting.over(self.lookup.missed * COUNTING, saved):
            return Plan(*self._choose(live, alive, most, {}))
        self.lookup.missed = 0
        places = live.alive.nonzero()[:, 0].tolist() if alive < len(live.alive) else range(alive)
        expected = cache(lambda kind: self.controller.tokens(kind, self.max_depth)[-1])
        kinds = {
            place: max(found, key=expected)
            for place, row in zip(places, live.index[live.alive].tolist(), strict=True)
            if (found := self.lookup.kinds(row))
        }
        depth, head = self._choose(live, alive, most, Counter(kinds.values()))
        if head:  # the rows that take the head's all the same
            tokens = {kind: self.controller.tokens(kind, depth)[depth] for kind in {HEAD, *kinds.values()}}
            kinds = {place: kind for place, kind in kinds.items() if tokens[kind] >= tokens[HEAD]}
        return Plan(depth, head, kinds) if depth else Plan()

    def of_graph(self, live: Rows) -> int:
        """How many drafts of the head a compiled round of these rows makes."""
        if not self.head:
            return 0
        if self.fixed:
            return self.max_depth
        speeds = self.controller.graph_speeds(len(live.index))
        depth = max(speeds, key=speeds.__getitem__)
        waits = depth and (missed := self.head.missed(live)) and not self._reads(missed, speeds[0], speeds[depth])
        return 0 if waits else depth

    def _choose(self, live: Rows, alive: int, most: int, found: Mapping[Kind, int]) -> tuple[int, bool]:
        """The controller's choice, but the head waits until it is worth what it has to read first."""
        depth, head, speed = self.controller.choose(alive, most, found, self.head is not None)
        if head and self.head and not self.fixed and (missed := self.head.missed(live)):
            other, _, slower = self.controller.choose(alive, most, found, head=False)
            if not self._reads(missed, slower, speed):
                return other, False
        return depth, head

    def _reads(self, missed: int, slower: float, speed: float) -> bool:
        """Whether the head reads the tokens that it has missed, and drafts. Both speeds are tokens a millisecond,
        without it and with it."""
        assert self.controller.costs is not None
        return self.reading.over(self.controller.costs.reading * missed, 1 / slower - 1 / speed)

    def draft(self, live: Rows, plan: Plan, noise: Noise, temperature: float | Tensor) -> Drafted | None:
        """The planned drafts. `temperature` is that of all rows, or of each [R]."""
        if not plan.depth:
            return None
        depth = plan.depth
        if plan.head and self.head:
            self.reading = Patience()  # it has missed nothing then
            self._add_reading(self.head, live)
            tokens_RK, confident_RK = self.head.draft(live, depth, noise, temperature)
            drafted = Drafted(tokens_RK, confident_RK=confident_RK, head=True)
        else:
            drafted = Drafted.nothing(len(live.index), depth, self.device)
        if plan.kinds and self.lookup:
            index, drafted.kinds = live.index.tolist(), plan.kinds
            found = [self.lookup.draft(index[place], source, depth) for place, (source, _) in plan.kinds.items()]
            places = torch.tensor(list(plan.kinds), device=self.device)
            tokens = torch.tensor([drafts + [0] * (depth - len(drafts)) for drafts in found], device=self.device)
            drafted.tokens_RK = drafted.tokens_RK.index_copy(0, places, tokens)
            made_R = torch.full_like(live.index, depth) if drafted.made_R is None else drafted.made_R
            made = torch.tensor([len(drafts) for drafts in found], device=self.device)
            drafted.made_R = made_R.index_copy(0, places, made)
        return drafted

    def catch_up(self, live: Rows, fits: bool) -> None:
        """Before a compiled round with drafts the head reads what it has missed, unless that `fits` into the round."""
        if self.head:
            self._add_reading(self.head, live)
            if not fits:
                self.head.read_ahead(live)

    def add_cost(self, alive: int, drafted: Drafted | None, kept_R: Tensor, by_graph: bool) -> None:
        """Of a round in which the live rows got `kept_R` tokens."""
        if costs := self.controller.costs:
            cost = plain = costs.milliseconds(alive, 0, by_graph=by_graph)
            if drafted:  # else each row got one token: a short round notices a sum
                cost = costs.milliseconds(alive, drafted.depth, not drafted.head, by_graph)
                plain *= int(kept_R.sum()) / alive
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

    def observe(self, live: Rows, alive: int, drafted: Drafted, accepted_R: Tensor) -> None:
        if self.fixed and self.lookup is None:
            return  # there is nothing to choose
        depth = drafted.depth
        if not drafted.kinds:
            steps = torch.arange(depth, device=self.device)
            agreed = (steps < accepted_R[:, None]) & live.alive[:, None]
            self.controller.observe(alive, agreed.sum(0).tolist())
            return
        of_kind: dict[Kind, list[int]] = {}
        for place, (taken, lives) in enumerate(zip(accepted_R.tolist(), live.alive.tolist(), strict=True)):
            kind = drafted.kinds.get(place, HEAD)
            if lives and (kind != HEAD or drafted.head):
                of_kind.setdefault(kind, []).append(taken)
        for kind, counts in of_kind.items():
            self.controller.observe(len(counts), [sum(count > d for count in counts) for d in range(depth)], kind)
