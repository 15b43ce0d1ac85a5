"""What sampling takes and returns: a prompt, its completions, and how each of them was drafted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from rewards.episode import ToolStats, answer_of

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "max_turns", "environment", "abort"]
ENDED: tuple[FinishReason, ...] = ("stop", "environment")  # what no limit has cut


@dataclass(frozen=True)
class Prompt:
    """One prompt as the policy sees it. Reward functions get its `columns` by name.

    `messages` are the chat messages from which a chat template made `text`; rewards with `chat: true` get them.
    `first_sample` is the index in its group of the first completion that is sampled, which is part of the noise's key.
    `fingerprint` is that of the problem it was made from (rewards/data/leakage.py), whatever an environment adds.

    >>> Prompt("gsm8k/train/0", "2 + 3 = ?", [17, 4, 21], {"answer": "#### 5"}).columns["answer"]
    '#### 5'
    """

    prompt_id: str
    text: str
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None
    first_sample: int = 0
    fingerprint: str = field(default="", compare=False)


def shards(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    """The prompts that are sampled together: `size` neighbours each, whoever samples them."""
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


@dataclass
class DraftStats:
    """How one completion was decoded.

    `target_forwards` counts the decoding forwards of the trunk that this completion took part in. They do not give the
    first token, which comes from the prefill that the whole group shares. `drafted[d]` and `accepted[d]` count drafts
    at depth d + 1; a draft after a stop token or past the length limit counts as drafted only. `depths` has the depth
    at which each token was drafted, 0 for a token of the trunk's own. `fallbacks` counts the forwards in which
    `accept: margin` found a draft that was not clear enough to take.

    `cost` is its share of what the rounds of its shard cost by the table of costs, and `plain_cost` of what as many
    tokens cost without drafts: milliseconds, 0 where there is no table, as with a fixed number of drafts.

    >>> DraftStats(2, [2, 2], [2, 1], depths=[0, 1, 2, 0, 1, 0]).target_forwards  # a first token, then 1 + 2 and 1 + 1
    2
    """

    target_forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    fallbacks: int = 0
    depths: list[int] = field(default_factory=list)
    cost: float = 0.0
    plain_cost: float = 0.0

    def __add__(self, after: DraftStats) -> DraftStats:
        """Adds the drafts of the part of a completion that comes after this one.

        >>> (DraftStats(2, [2], [1], depths=[0, 1, 0]) + DraftStats(1, [1, 1], [0, 0], depths=[0, 0])).drafted
        [3, 1]
        """
        return DraftStats(
            target_forwards=self.target_forwards + after.target_forwards,
            drafted=_sums(self.drafted, after.drafted),
            accepted=_sums(self.accepted, after.accepted),
            fallbacks=self.fallbacks + after.fallbacks,
            depths=self.depths + after.depths,
            cost=self.cost + after.cost,
            plain_cost=self.plain_cost + after.plain_cost,
        )


@dataclass(frozen=True)
class Segment:
    """Where a part of an agent's episode begins that has a prompt of its own. `start` counts the tokens of the
    completion."""

    start: int
    prompt_token_ids: list[int]


@dataclass
class Completion:
    """One sampled completion. `token_ids` end with the stop token when `finish_reason` is `stop`, and with stop
    strings, which training does not have, with the token that completed one; `text` ends before it.

    With tools it is an episode of several turns. `turns` are then its messages, the assistant's and the tools', and
    `sampled` [Lc] is false for tokens that a tool wrote, whose `logprobs` are 0. Both are empty without tools.

    With an external agent `turns` are the messages that it and the policy have exchanged, and `segments` the parts of
    `token_ids` that follow a prompt of their own; without any all of them follow the prompt of the group.

    `logprobs[t]` scores `token_ids[t]` under the policy at `temperature` that really sampled it (contract 2). Of tokens
    from elsewhere `temperature` is None.
    `routing` [Lc, routers, k], integers: the experts and dynamic heads that the trunk used when it read
    `token_ids[t]`, see `RoutingReplay`; -1 for the last token, which it never read. `versions` [Lc] are the policy
    versions that sampled each token; it is empty where all are `policy_version`, the one that sampled the last. So many
    tokens before it were `cached`: they had been read for an earlier request.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    policy_version: int
    draft: DraftStats = field(default_factory=DraftStats)
    routing: Tensor | None = field(default=None, compare=False)
    turns: list[dict[str, Any]] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    tools: ToolStats | None = None
    versions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    cached: int = field(default=0, compare=False)
    temperature: float | None = field(default=None, compare=False)

    def parts(self, prompt: Prompt) -> Iterator[tuple[list[int], slice]]:
        """Gives what the policy read first, and which tokens follow it: the whole completion after `prompt`, or each of
        its segments.

        >>> one = Completion([5, 6, 7], [-0.1, -0.3, -0.2], "", "stop", 0, segments=[Segment(0, [1]), Segment(2, [4])])
        >>> list(one.parts(Prompt("a", "", [9])))
        [([1], slice(0, 2, None)), ([4], slice(2, 3, None))]
        """
        begins = self.segments or ([Segment(0, prompt.token_ids)] if self.token_ids else [])
        for i, segment in enumerate(begins):
            end = begins[i + 1].start if i + 1 < len(begins) else len(self.token_ids)
            yield segment.prompt_token_ids, slice(segment.start, end)

    @property
    def num_sampled(self) -> int:
        """Counts those of its tokens that the policy sampled.

        >>> Completion([5, 6, 7], [-0.1, 0.0, -0.2], "", "stop", 0, sampled=[True, False, True]).num_sampled
        2
        """
        return sum(self.sampled) if self.sampled else len(self.token_ids)

    @property
    def num_turns(self) -> int:
        """Turns of the policy; 1 without tools."""
        return max(1, sum(message["role"] == "assistant" for message in self.turns))

    @property
    def episode(self) -> dict[str, Any]:
        """The `turns`, `sampled`, `tools` and `segments` as JSON takes them; nothing without tools."""
        if self.tools is None:
            return {}
        segments = {"segments": [asdict(segment) for segment in self.segments]} if self.segments else {}
        return {"turns": self.turns, "sampled": self.sampled, "tools": asdict(self.tools), **segments}

    @property
    def answer(self) -> str:
        """Gives what a reward reads: the text, or that of the policy's last turn where there were tools."""
        return answer_of(self.text, self.turns)


@dataclass
class RolloutGroup:
    """The G completions of one prompt by sample index. `prompt_routing` [Lp, routers, k]: of the prompt."""

    prompt: Prompt
    completions: list[Completion]
    prompt_routing: Tensor | None = field(default=None, compare=False)

    @property
    def texts(self) -> list[str]:
        """Gives what rewards read, see `Completion.answer`."""
        return [completion.answer for completion in self.completions]

    @property
    def turns(self) -> list[list[dict[str, Any]]] | None:
        """Gives what rewards with `chat: true` read of episodes: the messages of each. None without tools."""
        return [completion.turns for completion in self.completions] if any(c.tools for c in self.completions) else None


def _sums(one: Iterable[int], other: Iterable[int]) -> list[int]:
    return [x + y for x, y in zip_longest(one, other, fillvalue=0)]


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Counts the tokens, or the characters, with which both begin."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])
