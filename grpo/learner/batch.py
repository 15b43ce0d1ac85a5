"""Groups as the learner reads them: every prompt once, followed by its completions (contract 10).

A packed row is `[prompt | c1 | … | cG]`, the simplest `Tree`. A completion attends to the prompt and to itself, its
positions continue the prompt's, and the prompt's last token predicts the first token of all G completions. So it is
with all branches of a tree, in which several rows may stand. Tokens that a tool wrote are read like those of a prompt,
and nothing is learned from them.
Axes: B trees, T tokens of a tree, C completions of the micro-batch, L completion tokens (padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.learner.row import PackedRow, Sample
from grpo.learner.tree import BEGINS, READ, Tree
from policies.attention import Packing
from policies.devices import send
from policies.policy import Placement, Policy

if TYPE_CHECKING:
    from grpo.algorithm.dynamic_sampling import Drawn
    from grpo.learner.lessons import Lesson


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """What is learned from at once, with the counts that are global over it. Two batches are equal where they are the
    same.

    `works` keeps, for each loss, what its first forward has settled, such as log π_old. It stays with the batch,
    whatever else is learned in between.
    """

    rows: list[PackedRow]
    advantages: Tensor | list[list[list[float]]]  # [P, G], zero where a sample was left out; by token [P, G, Lc]
    num_samples: int
    num_completion_tokens: int
    step: int = 0
    tied_groups: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # what was measured while it was prepared
    seconds: float = 0.0  # that the values took
    tokens_by_version: dict[int, int] = field(default_factory=dict)  # completion tokens that each version has sampled
    draft_gain: float | None = None  # of their decoding; None where it is not known
    draft_depth: int | None = None  # how deep the draft head learns from lessons; None: as its options say
    lessons: Sequence[Lesson] = ()  # recorded ones, which the draft head learns from where there are no rows
    kind: Literal["rollouts", "solutions", "lessons"] = "rollouts"
    drawn: Drawn | None = None  # the groups that it was made of, without scores where none were given
    by_run: bool = False  # whether the run has sampled them as it is configured
    works: list[Any] = field(default_factory=list, repr=False)  # see `Work`, whose module imports this one

    def age(self, version: int) -> float:
        """Tells how many versions older than `version` the policy was that sampled a token, as the mean over tokens."""
        tokens = sum(self.tokens_by_version.values())
        return sum(max(version - v, 0) * n for v, n in self.tokens_by_version.items()) / max(tokens, 1)

    @property
    def all_tied(self) -> bool:
        return all(row.tied for row in self.rows)

    @property
    def from_rollouts(self) -> bool:
        """Tells whether a policy has sampled it."""
        return self.kind == "rollouts"


@dataclass(frozen=True)
class MicroBatch:
    """Trees padded to one length. Masks come from lengths, never from token values (contract 1)."""

    token_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T]
    before: Tensor  # [B, T] the token whose hidden state predicts token n
    segment: Tensor  # [B, T] the branch of a token: 0 the first, as the prompt of a group is; -1 padding
    until: Tensor  # [B, T] the last of the branches that go on from it; with `segment` all that attention has to know
    turn: Tensor  # [B, T] every turn that was sampled has a number of its own; 0 in prompts, -1 what tools wrote
    mask: Tensor  # [C, L] a completion's sampled tokens
    loss_mask: Tensor  # [C, L] those of them that are in the loss
    places: Tensor  # [N] where the scored tokens are in [B · T], each once
    numbers: Tensor  # [M] which of them stands in each of `cells`: several where samples share what was sampled
    cells: Tensor  # [M] where the sampled tokens of all completions are in [C · L], in the order of mask[mask]
    sampling_logprobs: Tensor  # [C, L]
    advantages: Tensor  # [C], or [C, L] where every token has its own
    rows: Sequence[PackedRow]  # tree after tree
    trees: Sequence[int]  # the tree in which each of them stands
    beginnings: Sequence[int]  # how many tokens the first branch of each tree has
    routing: Tensor | None = None  # [B, T, routers, k] what the sampler's routers chose, -1 where it did not say
    on_host: tuple[Tensor, Tensor] | None = None  # `segment` and `until` in the host's memory
    placement: Placement = None  # of the policy that learns; see `Policy.placement`
    counts: bool = True  # False: it only keeps other ranks company, which have one micro-batch more

    @property
    def learns(self) -> bool:
        """Tells whether the policy learns from it; if not, the draft head does. The rows of a micro-batch are alike."""
        return self.rows[0].learns

    @property
    def samples(self) -> list[Sample]:
        """The C completions, row by row."""
        return list(chain.from_iterable(row.samples for row in self.rows))

    @property
    def laid(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, Placement]:
        """Return the arguments of `Policy.hidden`."""
        return self.token_ids, self.position_ids, self.segment, self.until, self.on_host, self.placement

    @property
    def scored(self) -> Tensor:
        """Marks the tokens that were sampled [B, T]."""
        return self.turn > 0

    @property
    def head_segment(self) -> Tensor:
        """Gives `segment` as the MTP head sees it: the first token, which has no entry, is padding."""
        return _of_head(self.segment)

    def head_packing(self, trees: Sequence[int]) -> Packing | None:
        """The packing of the MTP head's entries in these trees, in the host's memory; None if it is not there."""
        if self.on_host is None:
            return None
        segment, until = self.on_host
        chosen = list(trees)
        return Packing(_of_head(segment[chosen]), until=until[chosen])

    def padded(self, per_token: Sequence[Sequence[float]]) -> Tensor:
        """Values given per token of each completion as [C, L], zeros after each end."""
        return _padded(per_token, self.mask.shape[1]).to(self.mask.device)

    def of_scored(self, x_BT: Tensor) -> Tensor:
        """The scored tokens' part of values [B, T, ...], as `x_BT[scored]` gives it: [N, ...]; differentiable."""
        return x_BT.flatten(0, 1)[self.places]

    def by_completion(self, flat_N: Tensor) -> Tensor:
        """Values of the scored tokens as [C, L]; differentiable."""
        values = flat_N.new_zeros(self.mask.numel()).index_copy(0, self.cells, flat_N[self.numbers])
        return values.view(self.mask.shape)

    def times(self, counted_C: Tensor) -> Tensor:
        """Counts the samples that have sampled each token [B, T], of those for which `counted_C` is 1 and not 0."""
        counted_M = counted_C[self.cells // self.mask.shape[1]].float()
        times = counted_M.new_zeros(self.turn.numel()).index_add(0, self.places[self.numbers], counted_M)
        return times.view(self.turn.shape)


def _of_head(segment: Tensor) -> Tensor:
    return F.pad(segment[:, 1:], (1, 0), value=-1)


def by_completion(rows: Sequence[PackedRow], values: Mapping[tuple[int, int], list[float]]) -> dict[int, list[float]]:
    """Values of the tokens of each sample, given by `index` and `start`, as those of each completion by its index. A
    completion is left out if one of its segments has none.

    >>> rows = [PackedRow([7], [Sample(4, [1], start=2)]), PackedRow([8], [Sample(4, [5, 6])])]
    >>> by_completion(rows, {(4, 0): [0.1, 0.2], (4, 2): [0.3]})
    {4: [0.1, 0.2, 0.3]}
    """
    samples = sorted(chain.from_iterable(row.samples for row in rows), key=lambda s: (s.index, s.start))
    lacking = {sample.index for sample in samples if (sample.index, sample.start) not in values}
    whole: dict[int, list[float]] = {}
    for sample in samples:
        if sample.index not in lacking:
            whole.setdefault(sample.index, []).extend(values[sample.index, sample.start])
    return whole


def split_rows(
    prompt_token_ids: list[int],
    samples: Sequence[Sample],
    max_tokens: int,
    prompt_routing: Tensor | None = None,
    group: int = 0,
) -> list[PackedRow]:
    """Packs samples first come into few rows of at most `max_tokens`; a single long completion gets its own."""
    parts: list[list[Sample]] = [[]]
    length = len(prompt_token_ids)
    for sample in samples:
        if parts[-1] and length + len(sample.token_ids) > max_tokens:
            parts.append([])
            length = len(prompt_token_ids)
        parts[-1].append(sample)
        length += len(sample.token_ids)
    return [PackedRow(prompt_token_ids, part, prompt_routing, group) for part in parts]


def micro_batches(
    rows: Sequence[PackedRow] | Sequence[Tree], max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Puts rows or trees of similar length together, at most `max_tokens` padded tokens at a time."""
    return (collate(part, device) for part in cut(rows, max_tokens))


def cut(rows: Sequence[Any], max_tokens: int) -> Iterator[Sequence[Any]]:
    """The rows or trees of each micro-batch; last come those from which the draft head alone learns."""
    ordered = sorted(rows, key=lambda row: (not row.learns, row.length))
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and ordered[end].length * (end + 1 - start) <= max_tokens:
            if ordered[end].learns != ordered[start].learns:
                break
            end += 1
        yield ordered[start:end]
        start = end


def collate(rows: Sequence[PackedRow] | Sequence[Tree], device: torch.device) -> MicroBatch:
    """Makes a micro-batch of these rows or trees, on the host, and sends it to the device at once."""
    return sent([lay_out(rows)], device)[0]


def lay_out(rows: Sequence[PackedRow] | Sequence[Tree]) -> MicroBatch:
    """Makes a micro-batch of these rows or trees in the host's memory."""
    trees = [row if isinstance(row, Tree) else Tree([row]) for row in rows]
    shape = len(trees), max(tree.length for tree in trees)
    token_ids, position_ids, before = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    segment, until, marks = (torch.full(shape, -1) for _ in range(3))
    for b, tree in enumerate(trees):
        for number, branch in enumerate(tree.laid()):
            at = slice(branch.start, branch.stop)
            token_ids[b, at], marks[b, at] = torch.tensor(branch.token_ids), torch.tensor(branch.marks)
            segment[b, at], until[b, at] = number, branch.until
            position_ids[b, at] = torch.arange(branch.depth, branch.depth + len(branch.token_ids))
            before[b, at] = torch.arange(branch.start - 1, branch.stop - 1)
            before[b, branch.start] = branch.preceding
    turn = (marks == BEGINS).cumsum(1).where(marks > READ, marks)
    packed = list(chain.from_iterable(tree.rows for tree in trees))
    samples = list(chain.from_iterable(row.samples for row in packed))
    mask = torch.zeros(len(samples), max(len(sample.token_ids) for sample in samples), dtype=torch.bool)
    for c, sample in enumerate(samples):
        mask[c, : len(sample.token_ids)] = torch.tensor(sample.sampled or True)
    if any(sample.token_advantages for sample in samples):
        advantages = _padded([sample.token_advantages for sample in samples], mask.shape[1])
    else:
        advantages = torch.tensor([sample.advantage for sample in samples])
    places, cells = (torch.from_numpy(np.flatnonzero(of.numpy() > 0)) for of in (turn, mask))
    stand, of_rows = [], []
    for b, tree in enumerate(trees):
        of_rows += [b] * len(tree.rows)
        for _, of_samples in tree.places():
            stand += [b * shape[1] + at for at in of_samples]
    sampled = nn.utils.rnn.pad_sequence(stand, batch_first=True).flatten()[cells]
    tensors = {
        "token_ids": token_ids,
        "position_ids": position_ids,
        "before": before,
        "segment": segment,
        "until": until,
        "turn": turn,
        "places": places,
        "numbers": torch.searchsorted(places, sampled),
        "cells": cells,
        "sampling_logprobs": _padded([sample.sampling_logprobs for sample in samples], mask.shape[1]),
        "advantages": advantages,
        "mask": mask,
        "loss_mask": mask & torch.tensor([[sample.in_loss] for sample in samples]),
    }
    beginnings = [len(tree.root.after[0].token_ids) for tree in trees]
    routing = _routing(trees, shape)
    return MicroBatch(rows=packed, trees=of_rows, beginnings=beginnings, routing=routing, **tensors)


def sent(minis: Sequence[MicroBatch], device: torch.device, policy: Policy | None = None) -> list[MicroBatch]:
    """Sends micro-batches that were laid out on the host to a device, all in one copy, with the placement that the
    `policy` has for them."""
    tensors: list[Tensor] = []
    placements: list[Placement] = []
    for mini in minis:
        placement = policy.placement((mini.segment, mini.until)) if policy else None
        placements.append(placement)
        tensors += _tensors_of(mini).values()
        tensors += placement.tensors if placement else ()
    copies, result = iter(send(tensors, device)), []
    for mini, placement in zip(minis, placements, strict=True):
        there: dict[str, Any] = dict.fromkeys(_tensors_of(mini))
        for name in there:
            there[name] = next(copies)
        if placement:
            there["placement"] = placement.with_tensors(list(islice(copies, len(placement.tensors))))
        result.append(replace(mini, on_host=(mini.segment, mini.until), **there))
    return result


def _tensors_of(mini: MicroBatch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(mini).items() if isinstance(value, Tensor)}


def _padded(per_token: Sequence[Sequence[float]], longest: int) -> Tensor:
    out = torch.zeros(len(per_token), longest)
    for c, values in enumerate(per_token):
        out[c, : len(values)] = torch.tensor(values)
    return out


def _routing(trees: Sequence[Tree], shape: tuple[int, int]) -> Tensor | None:
    """Pads the recorded choices of routers to [B, T, routers, k]; None where no row has any. Of a token that several
    samples share it is the choice that the first of them has recorded."""
    recorded: list[tuple[int, Any, Tensor]] = []
    for b, tree in enumerate(trees):
        for row, (of_prompt, of_samples) in zip(tree.rows, tree.places(), strict=True):
            if row.prompt_routing is not None:
                recorded.append((b, of_prompt, row.prompt_routing))
            for sample, at in zip(row.samples, of_samples, strict=True):
                if sample.routing is not None:
                    recorded.append((b, at, sample.routing))
    shapes = {routing.shape[1:] for *_, routing in recorded}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"routings of one step differ in [routers, k]: {sorted(map(list, shapes))}")
    of_all = torch.full((*shape, *shapes.pop()), -1)
    for b, at, routing in recorded:
        of_all[b, at] = of_all[b, at].where(of_all[b, at] >= 0, routing.long())
    return of_all
