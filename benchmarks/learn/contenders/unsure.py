"""Of four prompts the one of whose first completion the policy is least sure, and two updates on each batch.

Where π of a completion is near 1 the group will be tied. SPEED (arXiv:2506.09016) screens by the rewards of a few
completions; the likelihood of one says it too, and needs no reward.
"""

from __future__ import annotations

from typing import Any

from grpo.algorithm.dynamic_sampling import Drawn

OPTIONS = {"prompts_per_step": 21, "learner.updates_per_batch": 2}
CANDIDATES = 4  # prompts that are drawn for each that is used


def draw(session: Any, step: int) -> Drawn:
    """The groups of a step. What was sampled to choose by is counted in its metrics, and not learned from."""
    count = session.config.prompts_per_step
    candidates = session.prompts(step, CANDIDATES * count)
    looks = session.sample(candidates, step=step, draw=-1, group_size=1)  # noise that no group has
    completions = [group.completions[0] for group in looks]
    sure = [sum(completion.logprobs) for completion in completions]
    least = sorted(range(len(candidates)), key=sure.__getitem__)[:count]
    groups = session.sample([candidates[i] for i in sorted(least)], step=step)
    looked = {"completions": float(len(completions)), "tokens": float(sum(c.num_sampled for c in completions))}
    return Drawn(groups, session.score(groups), [0] * count, metrics=looked)
