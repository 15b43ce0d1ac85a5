"""A request for a completion in a batch that requests join and leave, and the news that it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rollout.group import Completion, Prompt
from rollout.sampling import SamplingParams


@dataclass(frozen=True)
class News:
    """What a request is told after a round: its new tokens and their log-probabilities, and its end.

    `completion` is there once it has ended. It is whole, with the tokens of all rounds. `error` says why the request
    can get no more. `version` is the policy's.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None
    error: str | None = None
    version: int = 0


@dataclass(eq=False)
class Request:
    """One completion that is asked for. `params` may differ from those of the batch in `temperature`,
    `max_completion_tokens`, `seed`, `start` and `stop_strings` alone. `tell` is called after every round
    that gave it something, in the thread that decodes.
    """

    prompt: Prompt
    params: SamplingParams
    tell: Callable[[News], None]
    home: int = 0  # those with the same number are decoded by the same worker
    told: int = 0
    cached: int = 0  # tokens of its prompt that were read before
    cost: float = 0.0  # its shares of what rounds cost, and of what as many tokens cost without drafts
    plain_cost: float = 0.0
