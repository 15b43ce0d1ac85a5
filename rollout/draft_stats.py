"""What drafts gave: tokens per forward, acceptance by depth, and the gain by the table of costs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from rollout.group import Completion


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
