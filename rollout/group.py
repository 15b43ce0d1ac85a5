"""What flows out of sampling: a prompt, its completions, and how each of them was drafted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One prompt as the policy sees it. `columns` travel to the reward functions by name.

    >>> Prompt("gsm8k/train/0", "2 + 3 = ?", [17, 4, 21], {"answer": "#### 5"}).columns["answer"]
    '#### 5'
    """

    prompt_id: str
    text: str
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class DraftStats:
    """How one completion was decoded.

    `target_forwards` counts the decoding forwards of the trunk that this completion took part in. The first token is
    not theirs: it comes from the prefill, which the whole group shares. `drafted[d]` and `accepted[d]` count drafts at
    depth d + 1; a draft behind a stop token or behind the length limit counts as drafted only.

    >>> DraftStats(target_forwards=2, drafted=[2, 2], accepted=[2, 1])      # a first token, then 1 + 2 and 1 + 1
    DraftStats(target_forwards=2, drafted=[2, 2], accepted=[2, 1], fallbacks=0)
    """

    target_forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    fallbacks: int = 0


@dataclass
class Completion:
    """One sampled completion. `token_ids` end with the stop token when `finish_reason` is `stop`.

    `logprobs[t]` scores `token_ids[t]` under the temperature-scaled policy that really sampled it (contract 2).
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    policy_version: int
    draft: DraftStats = field(default_factory=DraftStats)


def tokens_per_forward(completions: Iterable[Completion]) -> float | None:
    """Tokens that a decoding forward of the trunk gave: 1 without drafts, 1 + Σ acceptance at depth d with them.

    None where nothing was decoded beyond first tokens.
    """
    tokens = forwards = 0
    for completion in completions:
        tokens += len(completion.token_ids) - 1
        forwards += completion.draft.target_forwards
    return tokens / forwards if forwards else None


@dataclass
class RolloutGroup:
    """The G completions of one prompt, sample index in order."""

    prompt: Prompt
    completions: list[Completion]

    @property
    def texts(self) -> list[str]:
        return [completion.text for completion in self.completions]
