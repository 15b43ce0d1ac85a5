"""The loss of supervised steps: mean -log π over the tokens of gold solutions."""

from __future__ import annotations

from torch import Tensor

from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward
from grpo.learner.row import PackedRow
from grpo.learner.terms.term import Term, Work

METRICS = {"loss/sft": "cross-entropy of the worked solutions in the SFT stage, mean, nats per token"}


class SupervisedTerm(Term):
    """-Σ log π / N over the N sampled tokens in the loss, at temperature 1. Advantages do not count."""

    name = "supervised"
    in_total = False
    temperature = 1.0

    def teaches(self, batch: TrainingBatch) -> bool:
        return True

    def needs(self, row: PackedRow, work: Work) -> bool:
        return True

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor:
        in_loss = forward.logprobs.masked_fill(~mini.loss_mask, 0.0)
        loss = -in_loss.sum() / max(work.batch.num_completion_tokens, 1)
        work.note("loss/sft", loss)
        return loss
