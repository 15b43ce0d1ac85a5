"""A prompt and the completions of it that are learned from, before they stand in a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One completion to learn from, or a segment of it. `index` is the completion's place in the step: [group, sample]
    flattened. `start` is the place of the segment in the completion.

    A value function gives `token_advantages`, its `values` and the `returns` that it should have predicted, one for
    each token; other estimators give one `advantage`.
    """

    index: int
    token_ids: list[int]
    sampling_logprobs: list[float] = field(default_factory=list)
    advantage: float = 0.0
    finish_reason: str = "stop"
    token_advantages: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    routing: Tensor | None = None  # [Lc, routers, k]; see Completion
    sampled: list[bool] = field(default_factory=list)  # [Lc] false where a tool wrote; empty without tools
    start: int = 0
    in_loss: bool = True  # False: truncated, and `loss.mask_truncated_completions`

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled) if self.sampled else len(self.token_ids)

    @property
    def tied(self) -> bool:
        """There is nothing to learn from it."""
        return not self.in_loss or not (self.advantage or any(self.token_advantages))


@dataclass(frozen=True)
class PackedRow:
    """A prompt and completions of it.

    >>> PackedRow([7, 8], [Sample(0, [1, 2]), Sample(1, [3])]).length       # 7 8 1 2 3
    5
    """

    prompt_token_ids: list[int]
    samples: Sequence[Sample]
    prompt_routing: Tensor | None = None  # [Lp, routers, k]
    group: int = 0  # its place in the step; a group that is cut into several rows has it in all of them
    learns: bool = True  # False: the draft head alone learns from it, so that the trunk needs no gradient
    example_id: str = field(default="", compare=False)  # of a gold solution
    fingerprint: str = field(default="", compare=False)  # of its problem

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + sum(len(sample.token_ids) for sample in self.samples)

    @property
    def num_completion_tokens(self) -> int:
        """Counts the tokens that were sampled."""
        return sum(sample.num_sampled for sample in self.samples)

    @property
    def tied(self) -> bool:
        """Every advantage is zero: there is nothing to learn from these completions."""
        return all(sample.tied for sample in self.samples)
