"""The seam of the loss: what a term may do, and the batch that it works on.

The learner adds up its terms in the order of their table and makes one backward pass for each micro-batch. It knows no
term by name: a term brings its advantages, its weights, its metrics and its state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward, Likelihood
from grpo.learner.parallel import Ranks
from grpo.learner.row import PackedRow
from policies.devices import fetch
from policies.policy import Policy

if TYPE_CHECKING:
    from grpo.learner.lessons import Lesson
    from rewards.group_score import GroupScore


Noted: TypeAlias = tuple[float | Tensor, float]  # a value and its factor


@dataclass(eq=False)
class Work:
    """What is done with a batch for one loss, in one update or in several. The batch keeps it, and `fixed` holds what
    terms settle before the first update. Its own `batch` is a copy that knows no works."""

    batch: TrainingBatch
    likelihood: Likelihood
    ranks: Ranks
    terms: Sequence[Term]
    cut: Callable[[Sequence[PackedRow]], Iterator[MicroBatch]]  # rows into the micro-batches of this rank
    rows: Sequence[PackedRow]  # those that are read
    loss: object = None  # as `forward_backward` was given it
    minis: Sequence[MicroBatch] = ()  # of this rank
    probes: Sequence[MicroBatch] = ()  # a few samples that are read again after the step, see `likelihood.probes`
    version: int = 0  # of the policy, before the first update
    update: int = 0  # updates that were made with it
    number: int = 0  # place of the micro-batch that is read
    notes: dict[str, list[Noted]] = field(default_factory=lambda: defaultdict(list))  # metrics of that micro-batch
    seconds: float = 0.0
    seconds_apart: float = 0.0  # spent on micro-batches from which the trunk does not learn
    logprobs: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # before the first update, by segment
    policy_logprobs: dict[int, list[float]] = field(default_factory=dict)  # the same of all ranks, by Sample.index
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def temperature(self) -> float:
        """At which log-probabilities are computed: that of the rollouts, unless the loss has one of its own."""
        own = self.terms[0].temperature if self.terms else None
        return self.likelihood.temperature if own is None else own

    def note(self, name: str, value: float | Tensor, factor: float = 1.0) -> None:
        """A metric of this micro-batch, times `factor`: those of a step are added up, and of names that end in `_max`
        the largest is taken. A tensor is read when the step's micro-batches have been."""
        self.notes[name].append((value.detach() if isinstance(value, Tensor) else value, factor))


@dataclass(frozen=True)
class Later:
    """Metrics that `of` makes of these tensors, once they are in the host's memory. Those of all terms are read in one
    copy."""

    tensors: Sequence[Tensor]
    of: Callable[[Sequence[Tensor]], dict[str, float]]


def read(notes: Sequence[Mapping[str, list[Noted]]]) -> dict[str, float]:
    """The metrics of a step, from the notes of its micro-batches. All tensors are read in one copy."""
    tensors: list[Tensor] = []
    for part in notes:
        for values in part.values():
            tensors += [x for x, _ in values if isinstance(x, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    sums: dict[str, float] = defaultdict(float)
    for part in notes:
        for name, values in part.items():
            value = sum((next(numbers) if isinstance(x, Tensor) else x) * factor for x, factor in values)
            sums[name] = max(sums[name], value) if name.endswith("_max") else sums[name] + value
    return dict(sums)


def read_ends(ends: Sequence[dict[str, float] | Later]) -> dict[str, float]:
    """The metrics of a step, those of `Later` too. All of their tensors are read in one copy."""
    tensors: list[Tensor] = []
    for end in ends:
        tensors += end.tensors if isinstance(end, Later) else ()
    numbers, metrics = iter(fetch(tensors)), dict[str, float]()
    for end in ends:
        if isinstance(end, Later):
            metrics |= end.of(list(islice(numbers, len(end.tensors))))
        else:
            metrics |= end
    return metrics


class Term:
    """A summand of the loss. A term overrides what it needs; `per_token` or `scalar` is the least.

    >>> class Confidence(Term):
    ...     def per_token(self, mini, forward, work):
    ...         return 0.01 * forward.logprobs.exp()
    """

    name = ""  # of its weights in a checkpoint and of the norm of their gradient
    estimators: tuple[str, ...] = ()  # values of `loss.advantage` whose advantages its `prepare` makes
    in_total = True  # whether the metric loss/total counts it; what follows one that it does not count is not in it
    moves_trunk = True  # False: the trunk needs no gradient for its sake
    module: nn.Module | None = None  # weights that no other term moves: their gradient is clipped by itself
    keeps_module = False  # whether a checkpoint keeps them under `name`; else they are the policy's
    reads_lessons = False  # whether it learns from recorded lessons, see `lesson`
    temperature: float | None = None  # of the log-probabilities where it is the first term; None: of the rollouts
    reads_trees = True  # False: another policy that it asks reads no trees, see `Policy.reads_trees`

    def parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer with `params`, `peak` (the highest learning rate) and `weight_decay`."""
        return []

    def prepare(self, batch: TrainingBatch, scores: Sequence[GroupScore], work: Work) -> TrainingBatch:
        """The batch with the advantages that this term gives. `work` has all rows and no updates."""
        return batch

    def teaches(self, batch: TrainingBatch) -> bool:
        """Tells whether it has something to teach where every advantage of a batch is zero."""
        return False

    def begin_update(self, work: Work) -> None:
        """It is called before the first update and before `needs`; `work.rows` are still all rows of the batch."""

    def needs(self, row: PackedRow, work: Work) -> bool:
        """Tells whether it reads a tied row."""
        return False

    def before_update(self, work: Work) -> None:
        """It is called before the micro-batches of an update; `work.rows` are those that are read."""

    def advantages(self, advantages: Tensor, mini: MicroBatch, forward: Forward, old: Tensor, work: Work) -> Tensor:
        """The advantages [C] or [C, L] that the policy learns from; `old` [C, L] is log π before the step."""
        return advantages

    def per_token(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor:
        """Gives the loss of each token [C, L], of which the mean over the step's tokens is taken."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither per_token nor scalar")

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor | None:
        """Gives the summand of this micro-batch; None where it has none. Raises ValueError where `per_token` gives
        another shape: a mean, or one number for each completion, would count once for every token."""
        per_token = self.per_token(mini, forward, work)
        if per_token.shape != mini.mask.shape:
            raise ValueError(
                f"the loss of {type(self).__name__} has the shape {list(per_token.shape)}; return one number for each "
                f"token, {list(mini.mask.shape)}, of which the mean over the step's tokens is taken"
            )
        return per_token.masked_fill(~mini.loss_mask, 0.0).sum() / max(work.batch.num_completion_tokens, 1)

    def lesson(self, lesson: Lesson, work: Work) -> Tensor:
        """Gives the loss of a recorded lesson, where the term `reads_lessons`."""
        raise NotImplementedError(f"{type(self).__name__} does not override lesson")

    def end(self, works: Sequence[Work]) -> dict[str, float] | Later:
        """It is called after the last update with the batches of a step, and gives metrics of the step, `Later` where
        they need numbers of a device."""
        return {}

    # ---- around forwards ----------------------------------------------------------------------------------------

    def recording(self, policy: Policy) -> AbstractContextManager[Any]:
        """Entered around each forward that learns; `forward.records` has what it gives, by `name`."""
        return nullcontext()

    def as_at_first(self) -> AbstractContextManager[None]:
        """Entered around forwards of the reference of a LoRA run: the base as it was at step 0."""
        return nullcontext()
