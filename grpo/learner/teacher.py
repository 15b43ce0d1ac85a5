"""The teacher of on-policy distillation: a frozen policy that scores what the policy that learns has sampled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo.algorithm.advantages import distill
from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Likelihood
from policies.policy import Policy


class Teacher:
    """Advantages of every token from the log-probabilities of `policy`, at the temperature of the rollouts; those of
    the score are added times `reward_weight`."""

    def __init__(self, policy: Policy, reward_weight: float = 0.0) -> None:
        self.policy, self.reward_weight = policy, reward_weight
        policy.trunk.requires_grad_(False)

    def weigh(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with the score's part of the advantages."""
        weight = self.reward_weight
        rows = [
            replace(row, samples=[replace(sample, advantage=weight * sample.advantage) for sample in row.samples])
            for row in batch.rows
        ]
        return replace(batch, rows=rows, advantages=weight * torch.as_tensor(batch.advantages))

    @torch.no_grad()
    def advantages(
        self, likelihood: Likelihood, mini: MicroBatch, mask_CL: Tensor, old_CL: Tensor, num_completion_tokens: int
    ) -> tuple[Tensor, dict[str, float]]:
        """[C, L] of both parts, and this micro-batch's summand of the KL from the teacher."""
        own_CL = distill(old_CL, likelihood.forward(mini, self.policy).logprobs, mask_CL)
        kl = -own_CL.sum().item() / max(num_completion_tokens, 1)
        return own_CL + mini.advantages[:, None], {"loss/teacher_kl": kl}
