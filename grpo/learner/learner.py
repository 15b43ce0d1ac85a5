"""The GRPO learner: advantages in, one optimizer step out.

One step of GRPO, in the order of the code below:
1. score every completion against its group (`prepare`),
2. compute the log-probabilities of what was sampled, under the policy that learns (`Likelihood.forward`),
3. add up the terms of the loss on these, the policy loss first, and collect the gradient (`forward_backward`),
4. clip the gradient and move the weights (`optim_step`),
5. once a step, see how far that went and what terms do then (`finish`).

What a term does is in its file in grpo/learner/terms; the learner knows none by name. What a later call needs of an
earlier one is in the batch that both are given, so the learner remembers no batch, except while gradients wait.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo.config.learner import LearnerOptions
from grpo.config.loss import LossOptions
from grpo.learner import state as learner_state
from grpo.learner.batch import MicroBatch, TrainingBatch, by_completion, cut, lay_out, sent
from grpo.learner.likelihood import Likelihood, approx_kl, probes
from grpo.learner.master_weights import MasterWeights
from grpo.learner.optimizer import freeze_exact_parts, groups_of
from grpo.learner.parallel import ONE_PROCESS, Ranks
from grpo.learner.prepare import Advantages, check_groups, estimate, pack
from grpo.learner.row import PackedRow
from grpo.learner.terms.term import Later, Term, Work, read, read_ends
from grpo.learner.tree import Tree, forest
from grpo.learner.update import Update
from policies.policy import Policy, checkpoint_layers
from policies.synced_weights import SyncedWeights
from rewards.group_score import GroupScore
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from grpo.learner.terms.custom import Loss

OnMicroBatch = Callable[[int, int], None]  # is told how many were read, of how many


NUMBERS = ("betas", "eps", "weight_decay")  # of AdamW


class Learner:
    """Holds the policy that learns, its optimizer and the terms of its loss. `policy_version` counts the steps taken.

    >>> learner = grpo_learner(policy, config, reward_weights)
    >>> batch = learner.prepare(groups, scores)
    >>> metrics = learner.forward_backward(batch) | learner.optim_step()
    >>> metrics |= learner.finish(batch.works)

    `waiting` is the work whose gradients wait for `optim_step`.
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
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        """`terms` add up in this order; `likelihood` computes the log-probabilities that they read. `prepare` estimates
        advantages by `loss` and, where each reward is normalised by itself, by `reward_weights`."""
        self.policy, self.options, self.terms, self.likelihood = policy, options, terms, likelihood
        self.loss, self.reward_weights, self.ranks = loss or LossOptions(), reward_weights or {}, ranks
        self.policy_version = 0
        self.waiting: list[Work] = []
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
        self._configured = [_numbers_of(group) for group in self.optimizer.param_groups]
        self._synced: int | None = None  # the last version that was read for a publication

    @property
    def updates(self) -> int:
        """Counts the updates that this object has made: above 0 it has moved."""
        return self.update.count

    # ---- what a step learns from ------------------------------------------------------------------------------

    def prepare(
        self,
        groups: Sequence[RolloutGroup],
        scores: Sequence[GroupScore] | None = None,
        advantages: Advantages | Sequence[Sequence[float]] | None = None,
        step: int = 0,
    ) -> TrainingBatch:
        """Advantages by the chosen estimator or as they are given, groups packed with their prompt once. A completion
        without reward has no place in it. Without scores and advantages every advantage is 0.

        Raises ValueError, with the place in [group, sample], for what cannot be learned from: see `check_groups`.
        """
        options = self.options
        check_groups(groups, scores, advantages, self.likelihood.temperature)
        if not groups:
            return TrainingBatch([], torch.zeros(0, 0), 0, 0, step)
        known = scores or [GroupScore([0.0] * len(group.completions), {}) for group in groups]
        lengths_PG = [_lengths(group) for group in groups]
        estimated, tied_P = estimate(known, self.loss, self.reward_weights, lengths_PG)
        batch = pack(
            groups,
            known,
            estimated if advantages is None else advantages,
            tied_P,
            max_tokens=options.tokens_per_micro_batch if self.policy.paths.rows == "packed" else 0,
            routing_replay=options.routing_replay,
            mask_truncated=self.loss.mask_truncated_completions,
        )
        batch = replace(batch, step=step)
        for term in self.terms if advantages is None else ():
            batch = term.prepare(batch, known, self._work(batch, self.terms))
        return batch

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(
        self, batch: TrainingBatch, step: int | None = None, on_micro_batch: OnMicroBatch | None = None
    ) -> dict[str, float]:
        """All updates on a batch that nothing was learned from: see `forward_backward`, `optim_step` and `finish`."""
        batch = replace(batch, step=batch.step if step is None else step, works=[])
        metrics: dict[str, float] = {}
        for _ in range(self.options.updates_per_batch):
            metrics |= self.forward_backward(batch, on_micro_batch=on_micro_batch)
            metrics |= self.optim_step()
        return metrics | self.finish(batch.works)

    def forward_backward(
        self,
        batch: TrainingBatch,
        loss: Loss | None = None,
        on_micro_batch: OnMicroBatch | None = None,
    ) -> dict[str, float]:
        """Add the gradient of the loss on this batch to what waits for `optim_step`. `loss` takes the place of the
        first term, see `as_term`. What the first forward of a batch for a loss has settled, such as log π_old, holds
        for all later ones. Recorded lessons are read by the draft head's term alone.

        A batch in which every advantage is zero changes nothing, not even momentum, and says so in its metrics, unless
        a term teaches all the same. Raises NonFiniteStep, and then no gradient waits.
        """
        started = time.perf_counter()
        known = self.work_of(batch, loss)
        work = known or self._begin_work(batch, loss)
        metrics = dict(batch.metrics)
        if age := batch.age(work.version):
            metrics["mismatch/age_mean"] = age
        if not work.rows and not batch.lessons:
            return metrics | {"learner/updates": 0.0, "time/learn": batch.seconds + time.perf_counter() - started}
        if not self.waiting:
            self.update.zero()  # what the last update has left
        if not work.minis:
            self._lay_out(work)
        try:
            for term in work.terms:
                term.before_update(work)
            sums = self._backward_of_lessons(work) if batch.lessons else self._backward(work, on_micro_batch)
        except BaseException:
            self.drop()
            raise
        work.seconds += time.perf_counter() - started
        if known is None:
            batch.works.append(work)
        if work not in self.waiting:
            self.waiting.append(work)
        return metrics | self.ranks.sum_metrics(sums) | {"time/learn": work.seconds}

    def _backward(self, work: Work, on_micro_batch: OnMicroBatch | None) -> dict[str, float]:
        """The gradient of each micro-batch of this rank. Returns what terms have noted, added up."""
        notes = []
        for number, mini in enumerate(work.minis):
            began = time.perf_counter()
            work.number, work.notes = number, defaultdict(list)
            with self.likelihood.replaying(mini):
                out = self.likelihood.forward(mini, temperature=work.temperature)
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
                on_micro_batch(min(work.update * len(work.minis) + number + 1, total), total)
        return read(notes)

    def _backward_of_lessons(self, work: Work) -> dict[str, float]:
        work.notes = defaultdict(list)
        for lesson in work.batch.lessons:
            for term in work.terms:
                self.update.backward(term.lesson(lesson, work), work.batch.step, self.ranks)
        return read([work.notes])

    def optim_step(self, learning_rate: float | None = None, *, step: int | None = None) -> dict[str, float]:
        """Move the weights by the gradients that wait, at `learning_rate` or at the schedule's rate in this step, by
        default the batch's. Where none waits, nothing moves.

        Raises NonFiniteStep, and then nothing has moved.
        """
        started = time.perf_counter()
        if not self.waiting:
            return {}
        works, self.waiting = self.waiting, []
        step = works[-1].batch.step if step is None else step
        modules = {"": self.policy.trunk} | {term.name: term.module for term in self.terms if term.module is not None}
        norms = self.update.make(step, self.ranks, modules, learning_rate)
        metrics = {"learner/grad_norm": norms.pop(""), "learner/learning_rate": norms.pop("learning_rate")}
        metrics |= {f"{term.name}/grad_norm": norms[term.name] for term in self.terms if term.keeps_module}
        of_rollouts = [work for work in works if work.batch.from_rollouts]
        if any(work.update == 0 for work in of_rollouts) or self.policy_version == self._synced:
            self.policy_version += 1
        for work in works:
            work.update += 1
        if of_rollouts:
            metrics["learner/updates"] = float(max(work.update for work in of_rollouts))
        works[-1].seconds += time.perf_counter() - started
        return metrics | {"time/learn": sum(work.batch.seconds + work.seconds for work in works)}

    def finish(self, works: Sequence[Work]) -> dict[str, float]:
        """Do what is done once a step, for the works that its updates were made with: measure how far the policy has
        moved, and let terms do their part, such as move the routers' biases. Returns metrics."""
        if not works:
            return {}
        started = time.perf_counter()
        of_rollouts = [work for work in works if work.batch.from_rollouts]
        ends: list[dict[str, float] | Later] = [self._moved(of_rollouts)] if of_rollouts else []
        works_of: dict[int, tuple[Term, list[Work]]] = {}
        for work in works:
            for term in work.terms:
                works_of.setdefault(id(term), (term, []))[1].append(work)
        for term, of_term in works_of.values():
            ends.append(term.end(of_term))
        metrics = read_ends(ends)
        for work in works:
            work.minis = work.probes = ()  # they are made again where the same batch goes on
        works[-1].seconds += time.perf_counter() - started
        return metrics | {"time/learn": sum(work.batch.seconds + work.seconds for work in works)}

    def _moved(self, works: Sequence[Work]) -> Later:
        """How far the updates have moved the policy: some of the samples are read again."""
        parts, now = [], list[Tensor]()
        for work in works:
            before = self.keep_logprobs(work)
            parts.append(([mini.samples[0] for mini in work.probes], before))
            now += self.likelihood.again(work.probes, work.temperature)

        def of(logprobs: Sequence[Tensor]) -> dict[str, float]:
            left, moved = iter(logprobs), []
            for samples, before in parts:
                moved.append(approx_kl(samples, before, list(islice(left, len(samples)))))
            return {"policy/approx_kl": fmean(moved)}

        return Later(now, of)

    def keep_logprobs(self, work: Work) -> dict[tuple[int, int], list[float]]:
        """Put together what all ranks have read of a batch before its first update, for the record of its step."""
        before = self.ranks.union(work.logprobs)
        work.policy_logprobs = by_completion(work.batch.rows, before)
        return before

    # ---- the batch that is learned from ------------------------------------------------------------------------

    def work_of(self, batch: TrainingBatch, loss: Loss | None) -> Work | None:
        """What is done with a batch for this loss; None before its first forward."""
        loss = self._unless_configured(loss)
        for work in batch.works:
            if work.likelihood is self.likelihood and (work.loss is loss or work.loss == loss):
                return work
        return None

    def _unless_configured(self, loss: Loss | None) -> Loss | None:
        """The loss; None where it is the configured one, whether by its name or by its options."""
        options = getattr(self.terms[0], "options", None)
        is_name = isinstance(options, LossOptions) and loss == options.loss_type
        return None if is_name or loss == options else loss

    def _begin_work(self, batch: TrainingBatch, loss: Loss | None) -> Work:
        """The first work on this batch for this loss. Raises ValueError for a loss that cannot be."""
        first, loss = self.terms[0], self._unless_configured(loss)
        if loss is not None:
            from grpo.learner.terms.custom import as_term

            first = as_term(loss, first)
        terms = [first, *self.terms[1:]]
        if batch.lessons:
            terms = [term for term in terms if term.reads_lessons]
        work = self._work(batch, terms, loss)
        teaches = not batch.all_tied or any(term.teaches(batch) for term in terms)
        if not (batch.rows and teaches):
            work.rows = ()
            return work
        for term in terms:
            term.begin_update(work)
        work.rows = self._rows_that_count(work)
        return work

    def _work(self, batch: TrainingBatch, terms: Sequence[Term], loss: object = None) -> Work:
        own = replace(batch, works=[])  # so that a batch and its works do not keep each other in memory
        parts = self.likelihood, self.ranks, terms, self._cut, batch.rows
        return Work(own, *parts, loss, version=self.policy_version)

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

    def drop(self) -> None:
        """Drop the gradients that wait."""
        self.update.zero()
        self.waiting = []

    def _lay_out(self, work: Work) -> None:
        """Make the micro-batches of this rank and the probes of a batch, and send them to the device at once."""
        minis = list(self._shared(work.rows))
        again = [lay_out([row]) for row in probes(work.rows)] if work.batch.from_rollouts else []
        there = sent([*minis, *again], self.policy.device, self.policy)
        work.minis, work.probes = there[: len(minis)], there[len(minis) :]

    def _cut(self, rows: Sequence[PackedRow]) -> Iterator[MicroBatch]:
        """The micro-batches of this rank on its device, one after the other."""
        for mini in self._shared(rows):
            yield from sent([mini], self.policy.device, self.policy)

    def _shared(self, rows: Sequence[PackedRow]) -> Iterator[MicroBatch]:
        """The micro-batches of this rank in the host's memory. All ranks gather weights together, so one that has fewer
        than another gets some that count nothing."""
        most, ranks = self.options.tokens_per_micro_batch, self.ranks
        shared = [self._trees(rows, reader) for reader in range(ranks.readers)]
        parts = [list(cut(trees, most)) for trees in shared]
        yield from map(lay_out, parts[ranks.reader])
        for _ in range(max(map(len, parts)) - len(parts[ranks.reader])):
            shortest = min(rows, key=lambda row: row.length)
            yield replace(lay_out([shortest]), counts=False)

    def _trees(self, rows: Sequence[PackedRow], reader: int) -> Sequence[PackedRow] | Sequence[Tree]:
        """The rows of a reader; those that begin alike as trees. What belongs to one group is read by one reader."""
        most, ranks = self.options.tokens_per_micro_batch, self.ranks
        if not (self.policy.reads_trees and all(term.reads_trees for term in self.terms)):
            return ranks.share(rows, reader)
        if ranks.readers > 1:
            own = ranks.share(forest(rows, most, within_groups=True), reader)
            rows = list(chain.from_iterable(tree.rows for tree in own))
        return forest(rows, most)

    # ---- weights and state --------------------------------------------------------------------------------------

    def weights(self) -> SyncedWeights:
        """Gives what is published; it is to be read before the next step."""
        self._synced = self.policy_version
        return self.policy.synced_weights()

    def copy_weights(self) -> dict[str, Tensor]:
        """A copy of the weights that a checkpoint keeps of the policy; see `put_weights`."""
        return {name: tensor.clone() for name, tensor in self.state()[0]["policy"].items()}

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
        return learner_state.collect_tensors(*self._stateful), counters

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
        """The inverse of `state`; gradients that wait are dropped. Raises ValueError naming what does not fit."""
        learner_state.put(tensors, *self._stateful)
        self.drop()
        self._synced = None
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


def _lengths(group: RolloutGroup) -> list[int]:
    """The number of tokens of each completion."""
    return [len(completion.token_ids) for completion in group.completions]


def _numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """AdamW's numbers of a group of parameters."""
    return {name: group[name] for name in NUMBERS}
