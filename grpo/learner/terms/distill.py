"""The teacher of on-policy distillation: a frozen policy that scores what the policy that learns has sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from grpo.config.distill import DistillOptions
from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward, Likelihood
from grpo.learner.row import PackedRow
from grpo.learner.terms.term import Term, Work
from policies.lm_head import LMHead
from policies.logprobs import CHUNK_ELEMENTS, LEAST_LOGPROB, logprobs_from_hidden, scaled
from policies.policy import Policy

if TYPE_CHECKING:
    from grpo.config.run import TrainConfig
    from rewards.group_score import GroupScore

METRICS = {
    "loss/teacher_kl": "KL of the policy from the teacher (loss.advantage: distill), mean, nats per token: "
    "an estimate, or with distill.top_k the KL of the teacher's k tokens and the rest",
}


class Scores(Protocol):
    """Where a teacher's log-probabilities come from: weights that are loaded here, or a server."""

    @property
    def reads_trees(self) -> bool: ...

    def logprobs(self, likelihood: Likelihood, mini: MicroBatch) -> Tensor:
        """Scores the tokens that were sampled [C, L]."""

    def top(self, likelihood: Likelihood, mini: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens at every scored token, and their log-probabilities: [N, k] of both."""


class TeacherPolicy:
    """A teacher that is loaded here; it scores at the temperature of the rollouts."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        policy.trunk.requires_grad_(False)

    @property
    def reads_trees(self) -> bool:
        return self.policy.reads_trees

    @torch.no_grad()
    def logprobs(self, likelihood: Likelihood, mini: MicroBatch) -> Tensor:
        return likelihood.forward(mini, self.policy).logprobs

    @torch.no_grad()
    def top(self, likelihood: Likelihood, mini: MicroBatch, k: int) -> tuple[Tensor, Tensor]:
        hidden_ND = mini.of_scored(likelihood.preceding(mini, self.policy))
        return top_logprobs(hidden_ND, self.policy.output, k, likelihood.temperature)


def term(policy: Policy, config: TrainConfig, load: Callable[[str], Policy] | None) -> DistillTerm | None:
    """Raises ValueError where the variable with the key of a server is not set."""
    options: DistillOptions = config.distill
    if options.teacher is None:
        return None
    return DistillTerm(teacher_of(options, load), options.top_k)


def teacher_of(options: DistillOptions, load: Callable[[str], Policy] | None) -> Scores:
    """The frozen teacher, in the policy's precision and on its device, or at its server."""
    assert options.model is not None
    if options.url is not None:
        from grpo.learner.terms.teacher_server import TeacherServer  # other runs ask no server

        return TeacherServer(options.url, options.model)
    assert load is not None
    return TeacherPolicy(load(options.model))


class DistillTerm(Term):
    """What a teacher adds to the loss, from its log-probabilities of the tokens that were sampled.

    Without `top_k` these are advantages of every token. With it there is a summand of the loss in their place: the KL
    over the teacher's k likeliest tokens and all others as one. The advantages of the score count nothing.
    """

    name = "distill"
    estimators = ("distill",)

    def __init__(self, scores: Scores, top_k: int | None = None) -> None:
        self.scores, self.top_k = scores, top_k
        self.reads_trees = scores.reads_trees

    def prepare(self, batch: TrainingBatch, scores: Sequence[GroupScore], work: Work) -> TrainingBatch:
        rows = [replace(row, samples=[replace(sample, advantage=0.0) for sample in row.samples]) for row in batch.rows]
        return replace(batch, rows=rows, advantages=torch.zeros_like(torch.as_tensor(batch.advantages)))

    def teaches(self, batch: TrainingBatch) -> bool:
        return True

    def needs(self, row: PackedRow, work: Work) -> bool:
        return True

    def advantages(self, advantages: Tensor, mini: MicroBatch, forward: Forward, old: Tensor, work: Work) -> Tensor:
        if self.top_k is not None:
            return advantages
        taught_CL = distill(old, self.scores.logprobs(work.likelihood, mini), mini.loss_mask)
        work.note("loss/teacher_kl", -taught_CL.sum().item() / max(work.batch.num_completion_tokens, 1))
        return taught_CL + (advantages if advantages.dim() == 2 else advantages[:, None])

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor | None:
        if self.top_k is None:
            return None
        likelihood = work.likelihood
        ids_NK, teacher_NK = self.scores.top(likelihood, mini, self.top_k)
        hidden_ND = mini.of_scored(forward.preceding)
        policy_NK, _ = logprobs_from_hidden(hidden_ND, likelihood.policy.output, ids_NK, likelihood.temperature)
        kl_CL = mini.by_completion(top_k_kl(policy_NK, teacher_NK)).masked_fill(~mini.loss_mask, 0.0)
        loss = kl_CL.sum() / max(work.batch.num_completion_tokens, 1)
        work.note("loss/teacher_kl", loss)
        return loss


@torch.no_grad()
def top_logprobs(
    hidden: Tensor, lm_head: Tensor | LMHead, k: int, temperature: float = 1.0, *, elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of every position and their log-probabilities, without gradients: [N, D], [V, D] ->
    [N, k] of both. A k above V is V.

    >>> top_logprobs(torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0986123]]), k=1)     # 3/4: -0.2877
    (tensor([[1]]), tensor([[-0.2877]]))
    """
    head = LMHead(lm_head) if isinstance(lm_head, Tensor) else lm_head
    ids, logprobs = [], []
    for rows in hidden.split(max(1, elements // len(head.weight))):
        logits = scaled(head.logits(rows), temperature)
        top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        ids.append(top.indices)
        logprobs.append(top.values - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)


def distill(old_logprobs_BT: Tensor, teacher_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Gives on-policy distillation: Â_t = log π_T(y_t) - log π_old(y_t), 0 off the mask. [B, T] of three -> [B, T].

    Its policy gradient is in expectation minus the gradient of KL(π || π_T) of the next token, at the states that the
    policy itself has reached (Gu et al., MiniLLM, arXiv:2306.08543, eq. 3-4, without what a token does to later ones;
    Lu et al., On-Policy Distillation, 2025). The mean of -Â over tokens estimates that KL.

    >>> old, teacher = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    >>> distill(old, teacher, torch.tensor([[True, True]]))                     # -log 2, log 2
    tensor([[-0.6931,  0.6931]])
    """
    return (teacher_logprobs_BT - old_logprobs_BT).detach().masked_fill(~mask_BT, 0.0)


def top_k_kl(logprobs_NK: Tensor, teacher_logprobs_NK: Tensor) -> Tensor:
    """KL(π || π_T) of the next token over K tokens and the rest as one: [N, K] of both at the same tokens -> [N].

    It leaves out how the two differ inside the rest: KL = this + π(rest)·KL(π in the rest || π_T in the rest). So it is
    never above the KL of the whole vocabulary, and equal to it where at most one token is in the rest. Differentiable
    in the first; a rest below 1e-7 counts as 1e-7, and a log-probability below LEAST_LOGPROB as that.

    >>> own, teacher = torch.tensor([[0.25, 0.5]]).log(), torch.tensor([[0.5, 0.25]]).log()      # 1/4 is in both rests
    >>> top_k_kl(own, teacher)                                      # 1/4 log 1/2 + 1/2 log 2 + 0 = 1/4 log 2
    tensor([0.1733])
    """
    logprobs_NK, teacher_logprobs_NK = (x.clamp(min=LEAST_LOGPROB) for x in (logprobs_NK, teacher_logprobs_NK))
    rest_N, teacher_rest_N = ((1 - x.exp().sum(-1)).clamp(min=1e-7) for x in (logprobs_NK, teacher_logprobs_NK))
    within_N = (logprobs_NK.exp() * (logprobs_NK - teacher_logprobs_NK)).sum(-1)
    return within_N + rest_N * (rest_N.log() - teacher_rest_N.log())
