"""Replay: groups that were not tied are learned from again in the next STEPS steps, with importance weights.

The learner's own correction (`loss.importance_correction: auto`) weighs each token by π_old / μ, cut at 3, where a
batch holds tokens of an older version; π_old is the policy before this step and μ the one that sampled (contract 8).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grpo.learner.batch import TrainingBatch
from grpo.learner.row import PackedRow
from grpo.steps.listener import Listener

OPTIONS: dict[str, object] = {}
STEPS = 2


def listeners(session: Any) -> list[Listener]:
    return [Replay()]


class Replay(Listener):
    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        self.former: list[tuple[int, int, list[PackedRow]]] = []  # step, version and rows

    def prepare(self, batch: TrainingBatch) -> TrainingBatch:
        former = [entry for entry in self.former if entry[0] >= batch.step - self.steps]
        version = max(batch.tokens_by_version, default=0)
        self.former = [*former, (batch.step, version, [row for row in batch.rows if not row.tied])]
        rows, versions = list(batch.rows), dict(batch.tokens_by_version)
        samples = batch.num_samples
        for _, sampled_by, again in former:
            rows += numbered(again, rows)
            samples += sum(len(row.samples) for row in again)
            tokens = sum(row.num_completion_tokens for row in again)
            versions[sampled_by] = versions.get(sampled_by, 0) + tokens
        tokens = sum(row.num_completion_tokens for row in rows)
        return replace(batch, rows=rows, num_samples=samples, num_completion_tokens=tokens, tokens_by_version=versions)


def numbered(again: list[PackedRow], rows: list[PackedRow]) -> list[PackedRow]:
    """The rows with groups and indices that come after those of `rows`."""
    group = 1 + max(row.group for row in rows)
    index = 1 + max(sample.index for row in rows for sample in row.samples)
    return [
        replace(row, group=group + row.group, samples=[replace(s, index=index + s.index) for s in row.samples])
        for row in again
    ]
