"""Group sizes by predicted success, at equal completions a step: who is right half of the time gets the most.

The gradient of a prompt with n completions, each measured against the mean of the others, has a variance of about
p(1 − p) / (n − 1); the sizes make the sum over the prompts least (VIP, arXiv:2602.01601). Every prompt counts the same
whatever its size, and a completion's baseline does not hold its own reward, so the estimate stays unbiased.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.algorithm.success import SuccessModel
from grpo.steps.listener import Listener
from rewards.group_score import GroupScore
from rollout.group import Prompt, RolloutGroup

OPTIONS: dict[str, object] = {}
UNIT = 2  # completions that a prompt gets at once
LEAST = 0.02  # p(1 - p) of a prompt that is believed to be solved always or never


def listeners(session: Any) -> list[Listener]:
    return [Sizes()]


def draw(session: Any, step: int) -> tuple[Drawn, list[list[list[float]]]]:
    """The groups of a step, UNIT completions each, and the advantages of their tokens."""
    sizes = next(listener for listener in session.collector.listeners if isinstance(listener, Sizes))
    prompts = session.prompts(step)
    budget = len(prompts) * session.config.rollout.group_size // UNIT
    counts = units([sizes.model.predict(prompt.text) for prompt in prompts], budget)
    pieces = [
        replace(prompt, first_sample=UNIT * piece)
        for prompt, count in zip(prompts, counts, strict=True)
        for piece in range(count)
    ]
    groups = session.sample(pieces, step=step, group_size=UNIT)
    scores = session.score(groups)
    mean_size = UNIT * budget / len(prompts)
    drawn = Drawn(groups, scores, [0] * len(groups))
    return drawn, advantages(groups, scores, mean_size)


class Sizes(Listener):
    """Learns how likely a prompt is to be solved, from its words."""

    def __init__(self) -> None:
        self.model = SuccessModel()

    def learns(self, step: int, drawn: Drawn, batch: Any) -> dict[str, float]:
        outcomes = by_prompt(drawn.groups, drawn.scores)
        self.model.learn([(prompt.text, sum(rewards) / len(rewards)) for prompt, rewards in outcomes])
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["sizes"])


def units(rates: Sequence[float], budget: int) -> list[int]:
    """How many units each prompt gets of `budget`: one, and each further one where it lowers Σ p(1 − p) / (n − 1) most.

    >>> units([0.5, 1.0], 5)            # n = 8 and 2: .25/7 + .02/1; with 6 and 4 it is .25/5 + .02/3, which is more
    [4, 1]
    """
    counts = [1] * len(rates)
    variances = [max(rate * (1 - rate), LEAST) for rate in rates]

    def gain(i: int) -> float:
        now = UNIT * counts[i] - 1
        return variances[i] / now - variances[i] / (now + UNIT)

    heap = [(-gain(i), i) for i in range(len(rates))]
    heapq.heapify(heap)
    for _ in range(budget - len(rates)):
        i = heap[0][1]
        counts[i] += 1
        heapq.heapreplace(heap, (-gain(i), i))
    return counts


def by_prompt(groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> list[tuple[Prompt, list[float]]]:
    """The rewards of each prompt, over its units. A completion without reward counts as wrong."""
    rewards: dict[str, list[float]] = defaultdict(list)
    prompts: dict[str, Prompt] = {}
    for group, score in zip(groups, scores, strict=True):
        prompts.setdefault(group.prompt.prompt_id, group.prompt)
        rewards[group.prompt.prompt_id] += [reward or 0.0 for reward in score.rewards]
    return [(prompts[name], of_prompt) for name, of_prompt in rewards.items()]


def advantages(
    groups: Sequence[RolloutGroup], scores: Sequence[GroupScore], mean_size: float
) -> list[list[list[float]]]:
    """Â of every token: (R − mean) · n̄ / (n − 1) over all n completions of the prompt, n̄ in the mean over prompts.

    R − (mean of the other rewards) is (R − mean) · n / (n − 1), and n̄ / n makes the prompts weigh the same.
    """
    rewards = {prompt.prompt_id: of_prompt for prompt, of_prompt in by_prompt(groups, scores)}
    by_token = []
    for group, score in zip(groups, scores, strict=True):
        of_prompt = rewards[group.prompt.prompt_id]
        mean, scale = sum(of_prompt) / len(of_prompt), mean_size / (len(of_prompt) - 1)
        by_token.append(
            [
                [((reward or 0.0) - mean) * scale] * len(completion.token_ids)
                for reward, completion in zip(score.rewards, group.completions, strict=True)
            ]
        )
    return by_token
