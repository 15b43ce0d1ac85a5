"""The weight-sync check of quantised samplers: what they sample is scored by quantised matrices too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from grpo.learner.likelihood import logprobs_of_groups
from policies.policy import Policy
from rollout.group import RolloutGroup
from rollout.weight_sync.rounded import logprobs_of_trunk, rounded_trunk
from rollout.weight_sync.sync_check import Scores, compare


def scorer(policy: Policy, copies: str) -> Callable[[Sequence[RolloutGroup], float], Scores]:
    """Scores groups by matrices that are made afresh of the learner's weights; `copies` is their kind."""
    return partial(logprobs_of_trunk, rounded_trunk(policy, copies))


def fault_without_rounding(
    policy: Policy, groups: Sequence[RolloutGroup], temperature: float, version: int
) -> str | None:
    """Tells how the decoder differs from the learner where its matrices are not rounded: rounded ones are compared with
    the same decoder, which would hide an error of its own. One sampler's tokens do for all."""
    decoded = scorer(policy, "none")(groups, temperature)
    held = []
    for group, rows in zip(groups, decoded, strict=True):
        completions = [replace(c, logprobs=row) for c, row in zip(group.completions, rows, strict=True)]
        held.append(replace(group, completions=completions))
    name = "the decoder of the samplers, without rounding,"
    learned = {name: logprobs_of_groups(policy, groups, temperature)}
    return compare({name: held}, learned, version, policy.trunk.dtype).fault
