"""What the MTP head learns beside the policy: which rows teach it at a step, and its loss on them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.config.learner import MTPOptions, SftMTPOptions
from grpo.learner.batch import MicroBatch
from grpo.learner.lessons import Lesson
from grpo.learner.likelihood import Forward
from grpo.learner.optimizer import groups_of
from grpo.learner.row import PackedRow
from grpo.learner.terms.term import Term, Work
from policies.logprobs import CHUNK_ELEMENTS, logprobs_from_hidden
from policies.mtp import Divergence, draft_loss
from policies.policy import Policy

if TYPE_CHECKING:
    from grpo.config.run import LearningConfig

METRICS = {
    "loss/mtp": "loss of the MTP head over its depths, before its weight, detached from the base model; nats per token",
    "loss/mtp_tv": "the same by total variation (quartet mtp): share of drafts rejected at best, fraction",
    "time/mtp_head": "forward of the MTP head and its loss, without most of its backward, and all work on "
    "zero-variance groups that are read only for it; part of time/learn, seconds",
}
PAYS = 1.1  # least gain of a step's rollouts that is worth what the draft head's learning takes
IDLE_EVERY = 10  # often enough to learn that drafts pay again, for a tenth of the cost


def term(policy: Policy, config: LearningConfig, load: object = None) -> DraftHeadTerm | None:
    return None if policy.mtp is None else DraftHeadTerm(policy, config.mtp)


class DraftHeadTerm(Term):
    """The draft head learns what the policy would say next, from the same hidden states, detached (contract 7). It
    learns at the first update of a batch alone."""

    name = "draft_head"
    in_total = False
    moves_trunk = False
    reads_lessons = True

    def __init__(self, policy: Policy, options: MTPOptions) -> None:
        self.policy, self.options, self.module = policy, options, policy.mtp
        self.seconds = 0.0  # that it took in this step
        self.divergence: Divergence = "kl"

    def parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        return groups_of(self.module, self.options.learning_rate, weight_decay)

    def begin_update(self, work: Work) -> None:
        batch = work.batch
        work.fixed[self.name] = teaching(self.policy, self.options, work.rows, batch.step, batch.draft_gain)
        self.seconds = 0.0

    def needs(self, row: PackedRow, work: Work) -> bool:
        return row.group in work.fixed[self.name]

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor | None:
        began, together = time.perf_counter(), work.ranks.readers > 1
        weights = {} if work.update else work.fixed[self.name]
        options, temperature = self.options, work.likelihood.temperature
        loss = head_loss(self.policy, options, mini, forward.preceding, weights, temperature, together)
        if loss is None:
            return None
        work.note("loss/mtp", loss, 1 / options.loss_weight)
        self.seconds += time.perf_counter() - began if mini.learns else 0.0
        return loss

    def lesson(self, lesson: Lesson, work: Work) -> Tensor:
        """The mean over the completions' tokens of all lessons of the batch, at the depth of the batch."""
        policy, options = self.policy, self.options
        lm_head = drafted_rows(policy)
        loss = draft_loss(
            lesson.unrolled(policy, work.batch.draft_depth or options.depth),
            lesson.preceding,
            lesson.turn,
            lm_head,
            work.likelihood.temperature,
            max(1, CHUNK_ELEMENTS // 4 // len(lm_head)),
            divergence=self.divergence,
        )
        loss = loss / (work.batch.num_completion_tokens * work.ranks.readers)  # each reads all
        work.note("loss/mtp_tv" if self.divergence == "tv" else "loss/mtp", loss)
        return options.loss_weight * loss

    def end(self, works: Sequence[Work]) -> dict[str, float]:
        if not any(work.fixed.get(self.name) for work in works):
            return {}
        return {"time/mtp_head": self.seconds + sum(work.seconds_apart for work in works)}


def teaching(
    policy: Policy, options: MTPOptions, rows: Sequence[PackedRow], step: int, gain: float | None = None
) -> dict[int, float]:
    """The groups that the draft head learns from at this step, with the weight of each of their tokens.

    It learns in every step from all of them. Where drafts are known to have had little `gain` in the rollouts that are
    learned from, it is every `IDLE_EVERY` steps, and only from groups that are not tied: to read a tied group for the
    draft head takes longer than what the draft head then does with it.
    """
    rest = gain is not None and gain < PAYS
    if policy.mtp is None or options.loss_weight == 0 or (rest and step % IDLE_EVERY):
        return {}
    taught = dict.fromkeys(row.group for row in rows if not (rest and row.tied))
    tokens = sum(row.num_completion_tokens for row in rows if row.group in taught)
    return dict.fromkeys(taught, options.loss_weight / max(tokens, 1))


def head_loss(
    policy: Policy,
    options: MTPOptions,
    mini: MicroBatch,
    preceding_BTD: Tensor,  # the hidden state that predicts each token
    weights: Mapping[int, float],  # see `teaching`
    temperature: float,
    together: bool = False,  # several ranks gather the draft head's weights at once
) -> Tensor | None:
    """The draft loss of the rows that teach, weighted. Where this micro-batch has none of them it is None, or
    `together` that of its first row, with weight zero.

    With `train_base_model` it is the loss on gold tokens, and the trunk's as well (`quartet sft` only, contract 7).
    """
    teach = [row.group in weights for row in mini.rows]
    weight = next(iter(weights.values())) if any(teach) else 0.0
    if not any(teach) and not (together and weights):
        return None
    if not any(teach):
        teach[0] = True
    chosen = sorted({tree for tree, teaches in zip(mini.trees, teach, strict=True) if teaches})
    of_samples = [teaches for row, teaches in zip(mini.rows, teach, strict=True) for _ in row.samples]
    device = preceding_BTD.device
    if all(of_samples) and len(chosen) == len(preceding_BTD):  # as nearly always: nothing is sent
        rows, counted = torch.arange(len(chosen), device=device), torch.ones(len(of_samples), device=device)
    else:
        rows, counted = torch.tensor([*chosen, *of_samples], device=device).tensor_split([len(chosen)])
    times = mini.times(counted)
    if isinstance(options, SftMTPOptions) and options.train_base_model:
        loss = gold_draft_loss(policy, preceding_BTD, mini, chosen, options.depth, times)
    else:
        first = min(mini.beginnings[tree] for tree in chosen)
        ids, positions, entries = mini.token_ids[rows], mini.position_ids[rows], mini.head_segment[rows]
        preceding = preceding_BTD[rows]
        of_host = mini.head_packing(chosen)
        outputs = policy.unroll(preceding, ids, positions, entries, options.depth, first, mini.until[rows], of_host)
        turn = mini.turn[rows]
        of_some = turn.where(times[rows] > 0, -1)
        chunk = max(1, CHUNK_ELEMENTS // len(policy.lm_head))
        loss = draft_loss(outputs, preceding, of_some, drafted_rows(policy), temperature, chunk, times_BT=times[rows])
    return loss * weight


def drafted_rows(policy: Policy) -> Tensor:
    """The rows of the LM head of the tokens that can be drafted [K, D]."""
    return policy.lm_head if policy.draft_ids is None else policy.lm_head[policy.draft_ids]


def gold_draft_loss(
    policy: Policy,
    preceding_BTD: Tensor,
    mini: MicroBatch,
    trees: Sequence[int],
    depth: int,
    times_BT: Tensor | None = None,
) -> Tensor:
    """1/D Σ_d Σ_n −log P_d(token n + d) over the solutions in `trees` (DeepSeek-V3, eq. 24 and 25, before λ).

    `preceding_BTD[n]` is the trunk's hidden state that precedes token n; the gradient goes through it, the embeddings
    and the LM head. A token counts `times_BT`. Returns the sum over tokens; divide by their number.
    """
    assert policy.mtp is not None
    chosen = list(trees)
    times_BT = mini.scored.float() if times_BT is None else times_BT
    ids_BT, positions_BT, turn_BT = mini.token_ids[chosen], mini.position_ids[chosen], mini.turn[chosen]
    model = policy.trunk.get_decoder()
    embeddings = model.embed_tokens(ids_BT)
    outputs = policy.mtp.unroll(
        preceding_BTD[chosen],
        embeddings,
        lambda shift: model.rotary_emb(embeddings, positions_BT + shift),
        mini.head_segment[chosen],
        depth,
        until_BT=mini.until[chosen],
        given=mini.head_packing(chosen),
    )
    total = torch.zeros((), device=ids_BT.device)
    for d, output in enumerate(outputs, start=1):
        ahead = F.pad(turn_BT, (0, d))[:, d:]
        alive = (turn_BT > 0) & (ahead == turn_BT)
        gold = F.pad(ids_BT, (0, d))[:, d:][alive]
        if len(gold):
            logprobs, _ = logprobs_from_hidden(output[alive], policy.lm_head, gold)
            times = F.pad(times_BT[chosen], (0, d))[:, d:][alive]
            total = total - (logprobs * times).sum() / depth
    return total
