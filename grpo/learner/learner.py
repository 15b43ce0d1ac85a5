"""The GRPO learner: advantages in, one optimizer step out.

One step of GRPO, in the order of the code below:
1. score every completion against its group (`prepare`),
2. compute the log-probabilities of what was sampled, under the policy that learns (`Likelihood.forward`),
3. add up the terms of the loss on these, the policy loss first, and collect the gradient (`forward_backward`),
4. clip the gradient and move the weights (`optim_step`).

What a term does is in its file in grpo/learner/terms; the learner knows none by name.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo.config.learner import LearnerOptions
from grpo.config.loss import LossOptions
from grpo.learner import state as learner_state
from grpo.learner.batch import MicroBatch, TrainingBatch, by_completion, collate, cut, micro_batches
from grpo.learner.likelihood import Likelihood
from grpo.learner.master_weights import MasterWeights
from grpo.learner.optimizer import freeze_exact_parts, groups_of
from grpo.learner.parallel import ALONE, Ranks
from grpo.learner.prepare import Advantages, estimate, pack
from grpo.learner.row import PackedRow
from grpo.learner.terms.term import Term, Work, read
from grpo.learner.tree import Tree, forest
from grpo.learner.update import Update
from policies.policy import Policy, checkpoint_layers
from policies.publication import Publication
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from rewards.group_score import GroupScore

OnMicroBatch = Callable[[int, int], None]  # is told how many were read, of how many


NUMBERS = ("betas", "eps", "weight_decay")  # of AdamW


class Learner:
    """Holds the policy that learns, its optimizer and the terms of its loss. `policy_version` counts the steps taken.

    >>> learner = grpo_learner(policy, config, reward_weights)
    >>> batch = learner.prepare(groups, scores)
    >>> metrics = learner.forward_backward(batch) | learner.optim_step()
    """

    def __init__(
        self,
        policy: Policy,
        options: LearnerOptions,
        terms: Sequence[Term],
        likelihood: Likelihood,
        *,
        loss: LossOptions | None = None,
        reward_weights: Mapping[str, float] | None = None,
        schedule: Callable[[int], float] = lambda step: 1.0,
        ranks: Ranks = ALONE,
    ) -> None:
        """`terms` add up in this order; `likelihood` computes the log-probabilities that they read. `prepare` estimates
        advantages by `loss` and, where each reward is normalised by itself, by `reward_weights`."""
        self.policy, self.options, self.terms, self.likelihood = policy, options, terms, likelihood
        self.loss, self.reward_weights, self.ranks = loss or LossOptions(), reward_weights or {}, ranks
        self.policy_version = 0
        self.policy_logprobs: dict[int, list[float]] = {}
        """log π_old of what the last step learned from, by Sample.index; what needed no forward is not there."""
        freeze_exact_parts(policy)
        if options.gradient_checkpointing:
            checkpoint_layers(policy.trunk)
        self.masters = MasterWeights(policy, rounds=options.rounds)
        groups = groups_of(policy.trunk, options.learning_rate, options.weight_decay)
        for term in terms:
            groups += term.parameters(options.weight_decay)
        self.update = Update(self.masters, groups, options, schedule)
        self.optimizer = self.update.optimizer
        self.numbers: dict[str, Any] = {}  # of AdamW, other than the options say
        self._configured = [{name: group[name] for name in NUMBERS} for group in self.optimizer.param_groups]
        self._open: list[Work] = []  # whose gradients wait for the optimizer
        self._done: list[Work] = []  # of the last update, which may be made again
        self._published: int | None = None  # the last version that was read for a publication

    @property
    def updates(self) -> int:
        """Counts the updates that this object has made: above 0 it has moved."""
        return self.update.count

    # ---- what a step learns from ------------------------------------------------------------------------------

    def prepare(
        self,
        groups: Sequence[RolloutGroup],
        scores: Sequence[GroupScore],
        advantages: Advantages | Sequence[Sequence[float]] | None = None,
        step: int = 0,
    ) -> TrainingBatch:
        """Advantages by the chosen estimator or as they are given, groups packed with their prompt once. A completion
        without reward has no place in it."""
        options = self.options
        lengths_PG = [[len(completion.token_ids) for completion in group.completions] for group in groups]
        estimated, tied_P = estimate(scores, self.loss, self.reward_weights, lengths_PG)
        batch = pack(
            groups,
            scores,
            estimated if advantages is None else advantages,
            tied_P,
            max_tokens=options.tokens_per_micro_batch if self.policy.paths.rows == "packed" else 0,
            routing_replay=options.routing_replay,
            mask_truncated=self.loss.mask_truncated_completions,
        )
        batch = replace(batch, step=step)
        for term in self.terms if advantages is None else ():
            batch = term.prepare(batch, scores, self._work(batch, self.terms))
        return batch

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(
        self, batch: TrainingBatch, step: int | None = None, on_micro_batch: OnMicroBatch | None = None
    ) -> dict[str, float]:
        """All updates on a batch: see `forward_backward` and `optim_step`."""
        if step is not None:
            batch = replace(batch, step=step)
        metrics: dict[str, float] = {}
        for update in range(1, self.options.updates_per_batch + 1):
            metrics |= self.forward_backward(batch, on_micro_batch=on_micro_batch)
            if self._open:
                metrics |= self.optim_step(ends=update == self.options.updates_per_batch)
        return metrics

    def forward_backward(
        self,
        batch: TrainingBatch,
        loss: Term | None = None,
        on_micro_batch: OnMicroBatch | None = None,
    ) -> dict[str, float]:
        """Add the gradient of the loss on this batch to what waits for `optim_step`; with `loss` in place of the first
        term. The same batch after an update goes on with what was settled before it, such as log π_old. Recorded
        lessons are read by the draft head's term alone.

        A batch in which every advantage is zero changes nothing, not even momentum, and says so in its metrics, unless
        a term teaches all the same. Raises NonFiniteStep, and then no gradient waits.
        """
        started = time.perf_counter()
        terms = [loss, *self.terms[1:]] if loss else self.terms
        work = self._begin(batch, [term for term in terms if term.reads_lessons] if batch.lessons else terms)
        metrics = dict(batch.metrics)
        if age := batch.age(work.version):
            metrics["mismatch/age_mean"] = age
        if not work.minis and not batch.lessons:
            return metrics | {"learner/updates": 0.0, "time/learn": batch.seconds + time.perf_counter() - started}
        if not self._open:
            self.update.zero()  # what the last update has left
        try:
            for term in work.terms:
                term.before_update(work)
            sums = self._backward_of_lessons(work) if batch.lessons else self._backward(work, on_micro_batch)
        except BaseException:
            self._drop()
            raise
        work.seconds += time.perf_counter() - started
        if work not in self._open:
            self._open.append(work)
        return metrics | self.ranks.sum_metrics(sums) | {"time/learn": work.seconds}

    def _backward(self, work: Work, on_micro_batch: OnMicroBatch | None) -> dict[str, float]:
        """The gradient of each micro-batch of this rank. Returns what terms have noted, added up."""
        notes = []
        for number, mini in enumerate(work.minis):
            began = time.perf_counter()
            work.number, work.notes = number, defaultdict(list)
            with self.likelihood.replaying(mini):
                out = self.likelihood.forward(mini)
                loss, total, in_total = out.preceding.new_zeros(()), None, True
                for term in work.terms:
                    summand = term.scalar(mini, out, work)
                    if summand is not None:
                        loss = loss + summand
                    in_total = in_total and term.in_total
                    if in_total:
                        total = loss
                if total is not None:
                    work.note("loss/total", total)
                if loss.requires_grad:
                    self.update.backward(loss * mini.counts, work.batch.step, self.ranks)
            work.seconds_apart += 0.0 if mini.learns else time.perf_counter() - began
            if mini.counts:
                if work.update == 0:
                    for sample, logprobs in zip(mini.samples, out.logprobs.tolist(), strict=True):
                        work.logprobs[sample.index, sample.start] = logprobs[: len(sample.token_ids)]
                notes.append(work.notes)
            if on_micro_batch:
                total = len(work.minis) * self.options.updates_per_batch
                on_micro_batch(work.update * len(work.minis) + number + 1, total)
        return read(notes)

    def _backward_of_lessons(self, work: Work) -> dict[str, float]:
        work.notes = defaultdict(list)
        for lesson in work.batch.lessons:
            for term in work.terms:
                self.update.backward(term.lesson(lesson, work), work.batch.step, self.ranks)
        return read([work.notes])

    def optim_step(self, learning_rate: float | None = None, *, ends: bool = True) -> dict[str, float]:
        """Move the weights by the gradients that wait, at the schedule's rate or at `learning_rate`. Where none waits,
        nothing moves. `ends`: no other update with the same batches follows in this step.

        Raises NonFiniteStep, and then nothing has moved.
        """
        started = time.perf_counter()
        if not self._open:
            return {}
        works, self._open, self._done = self._open, [], self._open
        step = works[-1].batch.step
        modules = {"": self.policy.trunk} | {term.name: term.module for term in self.terms if term.module is not None}
        norms = self.update.make(step, self.ranks, modules, learning_rate)
        metrics = {"learner/grad_norm": norms.pop(""), "learner/learning_rate": norms.pop("learning_rate")}
        metrics |= {f"{term.name}/grad_norm": norms[term.name] for term in self.terms if term.keeps_module}
        begins = works[-1].update == 0 and works[-1].batch.from_rollouts
        if begins or self.policy_version == self._published:
            self.policy_version += 1
        for work in works:
            work.update += 1
        if works[-1].batch.from_rollouts:
            metrics["learner/updates"] = float(works[-1].update)
        if ends:
            metrics |= self._end(works)
            for work in works:
                work.minis = ()  # they are made again where the same batch goes on
        works[-1].seconds += time.perf_counter() - started
        return metrics | {"time/learn": sum(work.batch.seconds + work.seconds for work in works)}

    def _end(self, works: Sequence[Work]) -> dict[str, float]:
        """After the last update of a step: how far it has moved the policy, and what terms have to say."""
        metrics, moved = {}, []
        for work in works:
            if work.batch.from_rollouts:
                before = self.ranks.union(work.logprobs)
                self.policy_logprobs = by_completion(work.batch.rows, before)
                moved.append(self.likelihood.moved(work.rows, before))
        if moved:
            metrics["policy/step_kl"] = fmean(moved)
        for term in {id(term): term for work in works for term in work.terms}.values():
            metrics |= term.end([work for work in works if any(own is term for own in work.terms)])
        return metrics

    # ---- the batch that is learned from ------------------------------------------------------------------------

    def _begin(self, batch: TrainingBatch, terms: Sequence[Term]) -> Work:
        """The work on this batch by these terms goes on, or it begins."""
        for work in (*self._done, *self._open):
            if work.batch is batch and work.terms[0] is terms[0]:
                work.minis = work.minis or list(self._shared(work.rows))
                return work
        work = self._work(batch, terms)
        self.policy_logprobs = {}
        teaches = not batch.all_tied or any(term.teaches(batch) for term in terms)
        if batch.rows and teaches:
            for term in terms:
                term.begin(work)
            work.rows = self._rows_that_count(work)
            work.minis = list(self._shared(work.rows))
        return work

    def _work(self, batch: TrainingBatch, terms: Sequence[Term]) -> Work:
        version = self.policy_version
        return Work(batch, self.likelihood, self.ranks, terms, self._shared, batch.rows, version=version)

    def _rows_that_count(self, work: Work) -> list[PackedRow]:
        """A tied group's loss is zero: it is spared if no term reads it, or its gradient where none moves the trunk."""
        spares = self.ranks.readers == 1  # several go through the same layers together
        rows = []
        for row in work.rows:
            readers = [term for term in work.terms if term.needs(row, work)]
            if readers or not row.tied:
                moves = not row.tied or any(term.moves_trunk for term in readers)
                rows.append(row if moves or not spares else replace(row, learns=False))
        return rows

    def _drop(self) -> None:
        """Drops the gradients that wait."""
        self.update.zero()
        self._open = []

    def _shared(self, rows: Sequence[PackedRow]) -> Iterator[MicroBatch]:
        """The micro-batches of this rank. All ranks gather weights together, so one that has fewer than another gets
        some that count nothing."""
        most, ranks = self.options.tokens_per_micro_batch, self.ranks
        shared = [self._trees(rows, reader) for reader in range(ranks.readers)]
        numbers = [sum(1 for _ in cut(trees, most)) for trees in shared]
        yield from micro_batches(shared[ranks.reader], most, self.policy.device)
        for _ in range(max(numbers) - numbers[ranks.reader]):
            shortest = min(rows, key=lambda row: row.length)
            yield replace(collate([shortest], self.policy.device), counts=False)

    def _trees(self, rows: Sequence[PackedRow], reader: int) -> Sequence[PackedRow] | Sequence[Tree]:
        """The rows of a reader; those that begin alike as trees. What belongs to one group is read by one reader."""
        most, ranks = self.options.tokens_per_micro_batch, self.ranks
        if not (self.policy.reads_trees and all(term.reads_trees for term in self.terms)):
            return ranks.share(rows, reader)
        if ranks.readers > 1:
            own = ranks.share(forest(rows, most, within_groups=True), reader)
            rows = [row for tree in own for row in tree.rows]
        return forest(rows, most)

    # ---- weights and state --------------------------------------------------------------------------------------

    def weights(self) -> Publication:
        """Gives what is published; it is to be read before the next step."""
        self._published = self.policy_version
        return self.policy.publication()

    def set_numbers(self, **numbers: object) -> None:
        """Sets `betas`, `eps` and `weight_decay` of AdamW from now on, also after a resume; weight decay is on matrices
        only."""
        self.numbers |= numbers
        for group in self.optimizer.param_groups:
            are_matrices = all(weight.dim() > 1 for weight in group["params"])
            group.update({name: value for name, value in numbers.items() if are_matrices or name != "weight_decay"})

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Gives what a checkpoint keeps; see state.py."""
        counters: dict[str, Any] = {"policy_version": self.policy_version}
        numbers = {name: list(value) if name == "betas" else value for name, value in self.numbers.items()}
        counters |= {"numbers": numbers} if numbers else {}
        return learner_state.take(*self._stateful), counters

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
        """The inverse of `state`; what waits or goes on does so no more. Raises ValueError naming what does not fit."""
        learner_state.put(tensors, *self._stateful)
        self._drop()
        self._done, self._published = [], None
        self.policy_version = state["policy_version"]
        for group, configured in zip(self.optimizer.param_groups, self._configured, strict=True):
            group.update(configured)
        self.numbers = {}
        numbers = state.get("numbers", {})
        self.set_numbers(**numbers | ({"betas": tuple(numbers["betas"])} if "betas" in numbers else {}))

    @property
    def _stateful(self) -> tuple[Policy, MasterWeights, torch.optim.Optimizer, dict[str, nn.Module]]:
        modules: dict[str, nn.Module] = {t.name: t.module for t in self.terms if t.keeps_module and t.module}
        if self.likelihood.reference is not None:
            modules["reference"] = self.likelihood.reference
        return self.policy, self.masters, self.optimizer, modules
