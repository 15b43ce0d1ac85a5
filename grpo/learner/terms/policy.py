"""The policy loss as a term: clip, importance correction, KL to the reference, entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from grpo.algorithm import own
from grpo.algorithm.losses import Logprobs, TopEntropy, WholeStep, policy_loss, top_entropy_of
from grpo.config.loss import CorrectionMode, LossOptions
from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward
from grpo.learner.prepare import tokens_in_loss
from grpo.learner.row import PackedRow
from grpo.learner.terms.term import Term, Work
from policies.lora import has_adapter

FARTHEST = "mismatch/logprob_abs_max"


@dataclass
class Settled:
    """What the policy loss settles before the first update of a batch."""

    correction: CorrectionMode | None
    reads_tied: bool  # rows without an advantage too
    scale: float = 1.0  # of metrics that are means over the tokens that are read, not over all tokens of the step
    old: list[Tensor] = field(default_factory=list)  # log π_old of each micro-batch, as it was first read
    top: TopEntropy | None = None  # which entropies are among the highest


class PolicyTerm(Term):
    """`grpo.algorithm.losses.policy_loss` of each micro-batch. Its metrics are those of that function."""

    name = "policy"

    def __init__(self, options: LossOptions, *, sampler_differs: bool = False, longest: int | None = None) -> None:
        """`sampler_differs` from the learner, in precision or in backend. `longest` is the length limit of completions,
        the constant of dr_grpo."""
        self.options, self.sampler_differs, self.longest = options, sampler_differs, longest

    def teaches(self, batch: TrainingBatch) -> bool:
        return self.options.beta > 0 or self.options.entropy_coef != 0

    def needs(self, row: PackedRow, work: Work) -> bool:
        settled: Settled = work.fixed[self.name]
        return settled.reads_tied

    def begin_update(self, work: Work) -> None:
        """KL and entropy are of every token, the highest entropies those of the step; bnpo counts its micro-batch.
        Raises ValueError where `beta` asks for a reference that is not there."""
        likelihood, beta = work.likelihood, self.options.beta
        if beta and likelihood.reference is None and not has_adapter(likelihood.policy.trunk):
            raise ValueError(
                f"beta={beta:g}: there is no reference; set loss.beta in the configuration, or lora, whose base is one"
            )
        differs = self.sampler_differs or work.batch.age(work.version) > 0
        local = own.aggregate_of(self.options.loss_type) == "bnpo"
        reads_tied = self.teaches(work.batch) or local or self.options.top_entropy_quantile < 1
        work.fixed[self.name] = Settled(correction_of(self.options.importance_correction, differs), reads_tied)

    @torch.no_grad()
    def before_update(self, work: Work) -> None:
        """Look ahead where the highest entropies are asked for, which are those of the whole batch before its first
        update."""
        settled: Settled = work.fixed[self.name]
        work.likelihood.entropy_grad = self.options.entropy_coef != 0
        settled.scale = work.batch.num_completion_tokens / max(tokens_in_loss(work.rows), 1)
        if self.options.top_entropy_quantile == 1 or settled.top is not None:
            return
        entropies = []
        for mini in work.minis:
            with work.likelihood.replaying(mini):
                entropy = work.likelihood.forward(mini).entropy
            entropies += [entropy[mini.loss_mask].cpu()] if mini.counts else []
        read = chain.from_iterable(work.ranks.gather(entropies))
        settled.top = top_entropy_of(torch.cat([torch.zeros(0), *read]), self.options.top_entropy_quantile)

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor:
        settled: Settled = work.fixed[self.name]
        if work.number == len(settled.old):
            settled.old.append(forward.logprobs.detach())
        old = settled.old[work.number]
        sampling, advantages = mini.sampling_logprobs, mini.advantages
        for term in work.terms:
            advantages = term.advantages(advantages, mini, forward, old, work)
        mask, options = self.mask(mini), self.options
        reference = work.likelihood.of_reference(mini) if options.beta else None
        loss, metrics = policy_loss(
            Logprobs(forward.logprobs, old, sampling, reference),
            advantages,
            mask,
            options,
            entropy=forward.entropy if options.entropy_coef or options.top_entropy_quantile < 1 else None,
            correction=settled.correction,
            step=WholeStep(work.batch.num_completion_tokens, work.batch.num_samples, self.longest, settled.top),
        )
        for name, value in metrics.items():
            work.note(name, value, 1.0 if name.startswith("loss/") else settled.scale)
        work.note(FARTHEST, (old - sampling).masked_fill(~mask, 0.0).abs().max())
        return loss

    def mask(self, mini: MicroBatch) -> Tensor:
        """Marks the tokens in the loss [C, L]."""
        return mini.loss_mask if self.options.mask_truncated_completions else mini.mask


def correction_of(option: CorrectionMode | Literal["auto", "none"], differs: bool) -> CorrectionMode | None:
    """The importance correction that the user chose; by itself it is on where sampler and learner differ (contract 8).

    >>> correction_of("auto", differs=True), correction_of("auto", differs=False)
    ('token_truncate', None)
    """
    if option == "auto":
        return "token_truncate" if differs else None
    return None if option == "none" else option
