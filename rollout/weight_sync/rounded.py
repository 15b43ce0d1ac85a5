"""What a sampler with matrices in few bits must say of its canaries (contract 13).

Rounding moves log-probabilities further than most faults do, so the learner's own would hide those. They are compared
with those of matrices that are made afresh of the learner's weights, and then rounding explains no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from policies.decoding.absorbed import AbsorbedTrunk
from policies.decoding.quantized import held_as
from policies.logprobs import token_logprobs
from policies.lora import has_adapter
from policies.policy import Policy
from rollout.group import RolloutGroup


def rounded_trunk(policy: Policy, kind: str) -> AbsorbedTrunk:
    """The trunk for decoding of the weights that `policy` has now, with matrices of this kind."""
    if has_adapter(policy):
        policy = policy.merged()
    with held_as(kind):
        return AbsorbedTrunk(policy.trunk, policy.trunk.dtype, policy.max_length)


@torch.inference_mode()
def logprobs_of_trunk(
    trunk: AbsorbedTrunk, groups: Sequence[RolloutGroup], temperature: float
) -> list[list[list[float]]]:
    """The log-probabilities of each token, by group and completion. The completions of a group have one length, as
    canaries have."""
    return [_of_group(trunk, group, temperature) for group in groups]


def _of_group(trunk: AbsorbedTrunk, group: RolloutGroup, temperature: float) -> list[list[float]]:
    prompt = torch.tensor([group.prompt.token_ids], device=trunk.device)
    tokens = torch.tensor([completion.token_ids for completion in group.completions], device=trunk.device)
    (rows, length), begun = tokens.shape, prompt.shape[1]
    prompt = prompt.expand(rows, -1)
    cache = trunk.cache(rows, begun + length, torch.full((rows,), begun, device=trunk.device))
    read = trunk(prompt, torch.arange(begun, device=trunk.device).expand_as(prompt), cache)[:, -1:]
    cache.advance(begun)
    cache.whole_R = None
    written = tokens[:, :-1]
    if length > 1:
        positions = begun + torch.arange(length - 1, device=trunk.device).expand_as(written)
        read = torch.cat([read, trunk(written, positions, cache)], dim=1)
    return token_logprobs(trunk.logits(read), tokens, temperature).tolist()
