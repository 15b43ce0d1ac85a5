"""Hint distillation: the policy with the gold solution in its prompt teaches the policy without it, on its own samples.

A token's advantage is log π(y | hint) − log π(y), the gradient of −KL(π || π_hint) of the next token at the states that
the policy has reached (OPSD, arXiv:2601.18734; SDPO, arXiv:2601.20802). The teacher is the policy of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpo.learner.batch import TrainingBatch
from grpo.learner.row import PackedRow, Sample
from grpo.steps.listener import Listener
from rollout.group import Prompt

OPTIONS: dict[str, object] = {}
LARGEST = 2.0  # nats: a token that the teacher would never write must not outweigh all others


def listeners(session: Any) -> list[Listener]:
    return [Hint(session, rewards=0.0)]


class Hint(Listener):
    """`rewards` weighs the advantages of the rewards beside those of the teacher. Where `wrong`, the teacher sees the
    solution of the next problem."""

    def __init__(self, session: Any, rewards: float, *, wrong: bool = False) -> None:
        self.logprobs, self.rewards = session.logprobs, rewards
        task, tokenizer = session.task, session.policy.tokenizer
        self.encode = tokenizer.encode
        examples = task.train
        solutions = [example.solution for example in examples]
        shown = [*solutions[1:], solutions[0]] if wrong else solutions
        self.hints = {
            tuple(task.prompt(example, tokenizer).token_ids): hint
            for example, hint in zip(examples, shown, strict=True)
        }

    def prepare(self, batch: TrainingBatch) -> TrainingBatch:
        return replace(batch, rows=[self.learned(row) for row in batch.rows])

    def hinted(self, prompt_ids: Sequence[int]) -> Prompt:
        """The solution, and the prompt after it."""
        hint = self.encode(f"{self.hints[tuple(prompt_ids)]}\n", add_special_tokens=False)
        return Prompt("hint", "", [*hint, *prompt_ids])

    def learned(self, row: PackedRow) -> PackedRow:
        completions = [sample.token_ids for sample in row.samples]
        [taught] = self.logprobs([self.hinted(row.prompt_token_ids)], [completions])
        samples = [self.advantages(sample, of_sample) for sample, of_sample in zip(row.samples, taught, strict=True)]
        return replace(row, samples=samples)

    def advantages(self, sample: Sample, taught: Sequence[float]) -> Sample:
        """Each token's, from the teacher's log-probabilities and from those it was sampled with.

        >>> hint = object.__new__(Hint)
        >>> hint.rewards = 1.0
        >>> hint.advantages(Sample(0, [5, 6], [-0.75, -0.5], advantage=0.5), [-0.25, -5.0]).token_advantages
        [1.0, -1.5]
        """
        gains = [
            max(-LARGEST, min(LARGEST, teacher - policy))
            for teacher, policy in zip(taught, sample.sampling_logprobs, strict=True)
        ]
        return replace(sample, token_advantages=[self.rewards * sample.advantage + gain for gain in gains])
