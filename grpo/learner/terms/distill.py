"""The teacher of on-policy distillation: a frozen policy that scores what the policy that learns has sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from grpo.algorithm.advantages import distill
from grpo.algorithm.losses import top_k_kl
from grpo.config.distill import DistillOptions
from grpo.learner.batch import MicroBatch, PackedRow, TrainingBatch
from grpo.learner.likelihood import Forward, Likelihood
from grpo.learner.terms.term import Term, Work
from policies.few_logprobs import logprobs_at, top_logprobs
from policies.logprobs import CHUNK_ELEMENTS
from policies.policy import Policy

if TYPE_CHECKING:
    from rewards.group_score import GroupScore


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


def term(policy: Policy, config: Any, load: Callable[[str], Policy] | None) -> DistillTerm | None:
    """Raises ValueError where the variable with the key of a server is not set."""
    options: DistillOptions | None = getattr(config, "distill", None)
    if options is None or options.teacher is None:
        return None
    return DistillTerm(teacher_of(options, load), options.reward_weight, options.top_k)


def teacher_of(options: DistillOptions, load: Callable[[str], Policy] | None) -> Scores:
    """The frozen teacher, in the policy's precision and on its device, or at its server."""
    assert options.teacher is not None
    if options.url is not None:
        from grpo.learner.terms.teacher_server import TeacherServer  # other runs ask no server

        return TeacherServer(options.url, options.teacher, options.token_variable)
    assert load is not None
    return TeacherPolicy(load(options.teacher))


class DistillTerm(Term):
    """What a teacher adds to the loss, from its log-probabilities of the tokens that were sampled.

    Without `top_k` these are advantages of every token. With it there is a summand of the loss in their place: the KL
    over the teacher's k likeliest tokens and all others as one. The advantages of the score count `reward_weight`.
    """

    name = "distill"
    estimators = ("distill",)

    def __init__(self, scores: Scores, reward_weight: float = 0.0, top_k: int | None = None) -> None:
        self.scores, self.reward_weight, self.top_k = scores, reward_weight, top_k

    def prepare(self, batch: TrainingBatch, scores: Sequence[GroupScore], work: Work) -> TrainingBatch:
        weight = self.reward_weight
        rows = [
            replace(row, samples=[replace(sample, advantage=weight * sample.advantage) for sample in row.samples])
            for row in batch.rows
        ]
        return replace(batch, rows=rows, advantages=weight * torch.as_tensor(batch.advantages))

    def teaches(self, batch: TrainingBatch) -> bool:
        return True

    def needs(self, row: PackedRow, work: Work) -> bool:
        return True

    def advantages(self, advantages: Tensor, mini: MicroBatch, forward: Forward, old: Tensor, work: Work) -> Tensor:
        if self.top_k is not None:
            return advantages
        taught_CL = distill(old, self.scores.logprobs(work.likelihood, mini), mini.loss_mask)
        work.note("loss/teacher_kl", -taught_CL.sum().item() / max(work.batch.num_completion_tokens, 1))
        return taught_CL + advantages[:, None]

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor | None:
        if self.top_k is None:
            return None
        likelihood = work.likelihood
        ids_NK, teacher_NK = self.scores.top(likelihood, mini, self.top_k)
        hidden_ND, head_VD = forward.preceding[mini.scored], likelihood.policy.lm_head
        policy_NK = logprobs_at(hidden_ND, head_VD, ids_NK, likelihood.temperature, chunk=_chunk(head_VD))
        kl_CL = mini.by_completion(top_k_kl(policy_NK, teacher_NK)).masked_fill(~mini.loss_mask, 0.0)
        loss = kl_CL.sum() / max(work.batch.num_completion_tokens, 1)
        work.note("loss/teacher_kl", loss.item())
        return loss


def _chunk(lm_head_VD: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // lm_head_VD.shape[0])
