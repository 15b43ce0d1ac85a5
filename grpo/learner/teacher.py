"""The teacher of on-policy distillation: a frozen policy that scores what the policy that learns has sampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from grpo.algorithm.advantages import distill
from grpo.algorithm.losses import top_k_kl
from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward, Likelihood
from policies.logprobs import CHUNK_ELEMENTS, logprobs_at, top_logprobs
from policies.policy import Policy


class Scores(Protocol):
    """Where a teacher's log-probabilities come from: weights that are loaded here, or a server."""

    def logprobs(self, likelihood: Likelihood, mini: MicroBatch) -> Tensor:
        """[C, L] of the tokens that were sampled."""

    def top(self, likelihood: Likelihood, mini: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens at every scored token, and their log-probabilities: [N, k] of both."""


class TeacherPolicy:
    """A teacher that is loaded here; it scores at the temperature of the rollouts."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        policy.trunk.requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, likelihood: Likelihood, mini: MicroBatch) -> Tensor:
        return likelihood.forward(mini, self.policy).logprobs

    @torch.no_grad()
    def top(self, likelihood: Likelihood, mini: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        hidden_ND, head_VD = likelihood.preceding(mini, self.policy)[mini.scored], self.policy.lm_head
        return top_logprobs(hidden_ND, head_VD, k, likelihood.temperature, chunk=_chunk(head_VD))


class Teacher:
    """What a teacher adds to the loss, from its log-probabilities of the tokens that were sampled.

    Without `top_k` these are advantages of every token. With it there is a term of the loss in their place: the KL over
    the teacher's k likeliest tokens and all others as one. The advantages of the score are added times `reward_weight`.
    """

    def __init__(self, scores: Scores, reward_weight: float = 0.0, top_k: int | None = None) -> None:
        self.scores, self.reward_weight, self.top_k = scores, reward_weight, top_k

    def weigh(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with the score's part of the advantages."""
        weight = self.reward_weight
        rows = [
            replace(row, samples=[replace(sample, advantage=weight * sample.advantage) for sample in row.samples])
            for row in batch.rows
        ]
        return replace(batch, rows=rows, advantages=weight * torch.as_tensor(batch.advantages))

    def teach(
        self,
        likelihood: Likelihood,
        mini: MicroBatch,
        out: Forward,
        mask_CL: Tensor,
        old_CL: Tensor,
        num_completion_tokens: int,
    ) -> tuple[Tensor, Tensor | float, dict[str, float]]:
        """Advantages of both parts [C, L] (or [C] of the score alone), a term of the loss, and the KL from the teacher;
        the last two are summands over the step."""
        tokens = max(num_completion_tokens, 1)
        if self.top_k is None:
            own_CL = distill(old_CL, self.scores.logprobs(likelihood, mini), mask_CL)
            return own_CL + mini.advantages[:, None], 0.0, {"loss/teacher_kl": -own_CL.sum().item() / tokens}
        ids_NK, teacher_NK = self.scores.top(likelihood, mini, self.top_k)
        hidden_ND, head_VD = out.preceding[mini.scored], likelihood.policy.lm_head
        own_NK = logprobs_at(hidden_ND, head_VD, ids_NK, likelihood.temperature, chunk=_chunk(head_VD))
        kl_CL = mini.by_completion(top_k_kl(own_NK, teacher_NK)).masked_fill(~mask_CL, 0.0)
        term = kl_CL.sum() / tokens
        return mini.advantages, term, {"loss/teacher_kl": term.item()}


def _chunk(lm_head_VD: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // lm_head_VD.shape[0])
