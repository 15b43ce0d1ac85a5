"""Replay: groups that were not tied are learned from again in the next STEPS steps, with importance weights.

The learner's own correction (`loss.importance_correction: auto`) weighs each token by π_old / μ, cut at 3, where a
batch holds tokens of an older version; π_old is the policy before this step and μ the one that sampled (contract 8).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from grpo.learner.batch import TrainingBatch
from grpo.learner.row import PackedRow, Sample
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

    def state_dict(self) -> dict[str, Any]:
        return {"replay": [[step, version, [_plain(row) for row in rows]] for step, version, rows in self.former]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.former = [(step, version, [_row(row) for row in rows]) for step, version, rows in state["replay"]]


def _plain(row: PackedRow) -> dict[str, Any]:
    """The row as JSON takes it."""
    return json.loads(json.dumps(asdict(row), default=Tensor.tolist))


def _row(plain: Mapping[str, Any]) -> PackedRow:
    samples = [Sample(**of | {"routing": _routing(of["routing"])}) for of in plain["samples"]]
    return PackedRow(**{**plain, "samples": samples, "prompt_routing": _routing(plain["prompt_routing"])})


def _routing(choices: list[Any] | None) -> Tensor | None:
    return None if choices is None else torch.tensor(choices)


def numbered(again: list[PackedRow], rows: list[PackedRow]) -> list[PackedRow]:
    """The rows with groups and indices that come after those of `rows`."""
    group = 1 + max(row.group for row in rows)
    index = 1 + max(sample.index for row in rows for sample in row.samples)
    return [
        replace(row, group=group + row.group, samples=[replace(s, index=index + s.index) for s in row.samples])
        for row in again
    ]
