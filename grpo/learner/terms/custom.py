"""Losses of a caller's own, in place of the policy loss: of each token, or of all completions of a batch at once."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from grpo.config.loss import LossOptions, LossType
from grpo.learner.batch import MicroBatch, TrainingBatch, by_completion
from grpo.learner.likelihood import Forward
from grpo.learner.row import PackedRow
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.terms.supervised import SupervisedTerm
from grpo.learner.terms.term import Term, Work
from grpo.learner.terms.token_losses import LOSSES, TokenLoss
from policies.lora import has_adapter

Loss = str | LossOptions | Term | Callable[..., Tensor]
METRICS = {"loss/custom": "custom loss that your loop gave to forward_backward, summed over its parts"}
NAME = "loss/custom"


def as_term(loss: Loss, first: Term) -> Term:
    """Gives what `forward_backward` takes as its loss, as a term in place of `first`: a loss_type, which keeps the
    other options of the configuration, or "supervised"; options, a term, a function of four tensors (`PerToken`) or of
    one or two lists of them (`OfAll`). Raises ValueError for others.
    """
    if isinstance(loss, Term):
        return loss
    if loss == "supervised":
        return SupervisedTerm()
    # Names of token_losses.py, with their defaults. One that is a loss_type, too, is the loss_type.
    if isinstance(loss, str) and loss in LOSSES and loss not in get_args(LossType):
        return PerToken(TokenLoss(loss))
    if isinstance(loss, str | LossOptions):
        configured = first.options if isinstance(first, PolicyTerm) else LossOptions()
        options = configured.with_loss_type(loss) if isinstance(loss, str) else loss
        if isinstance(first, PolicyTerm):
            masks = first.options.mask_truncated_completions  # by which batches are packed
            if options.mask_truncated_completions != masks:
                raise ValueError(
                    f"mask_truncated_completions={options.mask_truncated_completions}: batches are prepared by "
                    f"loss.mask_truncated_completions={masks}; set it in the configuration"
                )
            return PolicyTerm(options, sampler_differs=first.sampler_differs, longest=first.longest)
        return PolicyTerm(options)
    count = sum(parameter.default is parameter.empty for parameter in inspect.signature(loss).parameters.values())
    if count == 4:
        return PerToken(loss)
    if count in (1, 2):
        return OfAll(loss, with_reference=count == 2)
    raise ValueError(
        f"a loss of {count} parameters: give a function of (logprobs, sampling_logprobs, advantages, mask), all of the "
        "tokens of a micro-batch, or of (logprobs) or (logprobs, reference_logprobs), lists of all completions"
    )


class PerToken(Term):
    """A function (logprobs, sampling_logprobs, advantages, mask), tensors [C, L], to the loss of each token [C, L].

    >>> PerToken(lambda logprobs, sampling_logprobs, advantages, mask: -advantages * logprobs)    # REINFORCE
    """

    name = "own"

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def teaches(self, batch: TrainingBatch) -> bool:
        return True

    def needs(self, row: PackedRow, work: Work) -> bool:
        return True

    def per_token(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor:
        advantages = mini.advantages
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(mini.mask)
        return self.function(forward.logprobs, mini.sampling_logprobs, advantages, mini.loss_mask)

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor | None:
        loss = super().scalar(mini, forward, work)
        assert loss is not None
        work.note(NAME, loss)
        return loss


class OfAll(Term):
    """The loss is a function of the log-probabilities of all completions of the batch, [Lc] each in the order of
    [group, sample]; it takes the reference's as a second list where it has two parameters.

    It is called once before each update, on every rank with all completions. The gradient by each log-probability then
    weighs that token in whichever micro-batch and on whichever rank its row is.

    >>> def dpo(policy, reference):                    # completions 0 and 1 of each pair: the better one comes first
    ...     gains = torch.stack([(p - r).sum() for p, r in zip(policy, reference)])
    ...     return -torch.nn.functional.logsigmoid(0.1 * (gains[0::2] - gains[1::2])).mean()
    >>> session.forward_backward(batch, dpo)
    """

    name = "own"

    def __init__(self, function: Callable[..., Tensor], *, with_reference: bool) -> None:
        self.function, self.with_reference = function, with_reference

    def teaches(self, batch: TrainingBatch) -> bool:
        return True

    def needs(self, row: PackedRow, work: Work) -> bool:
        return True

    def begin_update(self, work: Work) -> None:
        """Raises ValueError if there is no reference to score by, or if a completion of the batch was left out: the
        others would be in its place."""
        _refuse_left_out(work.batch)
        likelihood = work.likelihood
        if self.with_reference and likelihood.reference is None and not has_adapter(likelihood.policy.trunk):
            raise ValueError(
                "this loss takes the reference's log-probabilities, and there is no reference: set lora, whose base is "
                "the reference, or loss.beta above 0"
            )

    @torch.no_grad()
    def before_update(self, work: Work) -> None:
        policy: dict[tuple[int, int], list[float]] = {}
        reference: dict[tuple[int, int], list[float]] = {}
        for mini in work.minis:
            with work.likelihood.replaying(mini):
                policy |= _segments(mini, work.likelihood.forward(mini).logprobs)
                if self.with_reference:
                    reference |= _segments(mini, work.likelihood.of_reference(mini))
        whole = _whole(work, work.ranks.union(policy))
        lists = [[torch.tensor(values, requires_grad=True) for values in whole.values()]]
        if self.with_reference:
            lists.append([torch.tensor(values) for values in _whole(work, work.ranks.union(reference)).values()])
        with torch.enable_grad():
            loss = self.function(*lists)
            gradients = torch.autograd.grad(loss, lists[0], allow_unused=True)
        weights: dict[tuple[int, int], list[float]] = {}
        by_index = {index: gradient for index, gradient in zip(whole, gradients, strict=True) if gradient is not None}
        read: Counter[int] = Counter()  # tokens of each completion, segment after segment
        for sample in sorted((s for row in work.rows for s in row.samples), key=lambda s: (s.index, s.start)):
            begin = read[sample.index]
            read[sample.index] = end = begin + len(sample.token_ids)
            if sample.index in by_index:
                weights[sample.index, sample.start] = by_index[sample.index][begin:end].tolist()
        work.fixed[self.name] = weights, loss.item()

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor:
        weights, loss = work.fixed[self.name]
        if work.number == 0 and work.ranks.reader == 0:
            work.note(NAME, loss)
        weights_CL = mini.padded([weights.get((sample.index, sample.start), []) for sample in mini.samples])
        return (weights_CL * forward.logprobs).masked_fill(~mini.mask, 0.0).sum()


def _refuse_left_out(batch: TrainingBatch) -> None:
    size = len(batch.advantages[0])
    known = {sample.index for row in batch.rows for sample in row.samples}
    for index in range(len(batch.advantages) * size):
        if index not in known:
            raise ValueError(
                f"group {index // size}, sample {index % size} has no reward, or no tokens, and so no place in the "
                "batch; a loss of all completions needs each of them: give it a reward, or leave its group out"
            )


def _segments(mini: MicroBatch, logprobs_CL: Tensor) -> dict[tuple[int, int], list[float]]:
    values = zip(mini.samples, logprobs_CL.tolist(), strict=True)
    return {(sample.index, sample.start): row[: len(sample.token_ids)] for sample, row in values if mini.counts}


def _whole(work: Work, segments: dict[tuple[int, int], list[float]]) -> dict[int, list[float]]:
    """Joins the values of segments to those of whole completions, in the order of [group, sample]."""
    return dict(sorted(by_completion(work.rows, segments).items()))
