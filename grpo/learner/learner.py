"""The GRPO learner: advantages in, one optimizer step out.

One step of GRPO, in the order of the code below:
1. score every completion against its group (`prepare`),
2. compute the log-probabilities of what was sampled, under the policy that learns (`Likelihood.forward`),
3. raise those with a positive advantage, lower the others, no further than the clip allows (`policy_loss`),
4. teach the MTP head, on the same hidden states, to predict what the policy would say next (`head_loss`).
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.algorithm import own
from grpo.algorithm.losses import TopEntropy, mask_truncated_completions, policy_loss, top_entropy_of
from grpo.config.learner import BalanceOptions, LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions, ValueOptions
from grpo.learner import state as learner_state
from grpo.learner.batch import MicroBatch, PackedRow, TrainingBatch, by_completion, collate, cut, micro_batches
from grpo.learner.draft_head import head_loss, teaching
from grpo.learner.experts import Balancer
from grpo.learner.likelihood import Forward, Likelihood
from grpo.learner.master_weights import MasterWeights
from grpo.learner.optimizer import freeze_exact_parts, parameter_groups
from grpo.learner.parallel import ALONE, Ranks
from grpo.learner.prepare import importance_correction_of, pack, tokens_in_loss, with_values
from grpo.learner.teacher import Teacher
from grpo.learner.update import Update
from grpo.learner.value import ValueHead, head_value_loss
from policies.lora import has_adapter
from policies.policy import Policy
from policies.publication import Publication
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from rewards.scorer import GroupScore


class Learner:
    """Holds the policy that learns and its optimizer. `policy_version` counts the steps taken."""

    def __init__(
        self,
        policy: Policy,
        options: LearnerOptions,
        mtp: MTPOptions,
        loss: LossOptions | None = None,
        *,
        balance: BalanceOptions | None = None,
        temperature: float = 1.0,
        max_completion_tokens: int = 0,
        reward_weights: Mapping[str, float] | None = None,
        learning_rate: float | None = None,
        schedule: Callable[[int], float] | None = None,
        value: ValueOptions | None = None,
        sampler_differs: bool | None = None,  # in precision or backend; None: it does below fp32
        ranks: Ranks = ALONE,
        reload: Callable[[], Policy] | None = None,  # `policy` again, where it is sharded and so cannot be copied
        teacher: Teacher | None = None,  # of loss.advantage: distill
    ) -> None:
        self.teacher = teacher
        self.ranks = ranks
        self.policy, self.options, self.mtp = policy, options, mtp
        self.loss, self.value = loss or LossOptions(), value or ValueOptions()
        self.temperature, self.max_completion_tokens = temperature, max_completion_tokens
        self.reward_weights = reward_weights or {}
        self.balancer = Balancer(policy, balance or BalanceOptions())
        self.policy_version = self.skipped_in_a_row = 0
        freeze_exact_parts(policy)
        if options.gradient_checkpointing:
            policy.trunk.gradient_checkpointing_enable({"use_reentrant": False})
            for module in policy.trunk.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True  # else transformers ignores it; what is inside (dropout) stays in eval mode
        self.reference: Policy | None = None
        if self.loss.beta > 0 and not has_adapter(policy.trunk):
            self.reference = (reload() if reload else copy.deepcopy(policy)).requires_grad_(False)
        self.sampler_differs = policy.trunk.dtype != torch.float32 if sampler_differs is None else sampler_differs
        self.importance_correction = importance_correction_of(self.loss.importance_correction, self.sampler_differs)
        # log π_old of what the last step learned from, by Sample.index; what needed no forward is not there.
        self.policy_logprobs: dict[int, list[float]] = {}
        self.head_seconds = 0.0  # that the draft head took in this step
        self._scored: dict[tuple[int, int], list[float]] = {}  # the same of each segment
        self.value_head: ValueHead | None = None
        if self.loss.advantage in ("gae", "rank_softmax"):
            self.value_head = ValueHead(policy.config.hidden_size, self.value.hidden_size).to(policy.device)
        self.likelihood = Likelihood(
            policy, self.reference, self.balancer, temperature, entropy_grad=self.loss.entropy_coef != 0
        )
        self.masters = MasterWeights(policy, rounds=options.stochastic_rounding)
        groups = parameter_groups(policy, learning_rate or options.learning_rate, options.weight_decay, mtp)
        if self.value_head is not None:
            rate = self.value.learning_rate
            groups.append({"params": list(self.value_head.parameters()), "lr": rate, "peak": rate, "weight_decay": 0.0})
        self.update = Update(self.masters, groups, options, schedule or (lambda step: 1.0))
        self.optimizer = self.update.optimizer

    @property
    def updates(self) -> int:
        """How many this object has made: whether it has moved."""
        return self.update.count

    # ---- what a step learns from ------------------------------------------------------------------------------

    def prepare(self, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> TrainingBatch:
        """Advantages by the chosen estimator, groups packed with their prompt once; without reward no place in it."""
        options = self.options
        batch = pack(
            groups,
            scores,
            self.loss,
            self.reward_weights,
            max_tokens=options.tokens_per_micro_batch,
            routing_replay=options.routing_replay,
        )
        if self.teacher:
            batch = self.teacher.weigh(batch)
        if self.value_head is None:
            return batch
        minis = self._shared(batch.rows)
        return with_values(batch, scores, self.loss, self.value, self._values, minis, self.ranks)

    def _values(self, mini: MicroBatch) -> Tensor:
        """[C, L]: the value before each token."""
        assert self.value_head is not None
        with self.likelihood.replaying(mini):
            return mini.by_completion(self.value_head(self.likelihood.preceding(mini)[mini.scored]))

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(
        self, batch: TrainingBatch, step: int, on_micro_batch: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """One or several optimizer updates on a batch of rollouts. Raises NonFiniteStep instead of an update.

        A batch in which every advantage is zero changes nothing, not even momentum, and says so in its metrics; unless
        KL, entropy, balance, a teacher or wrong values teach all the same.
        """
        started = time.perf_counter()
        anchored = self.loss.beta > 0 or self.loss.entropy_coef != 0 or self.balancer.trains or self.teacher is not None
        metrics: dict[str, float] = dict(batch.metrics)
        self.policy_logprobs, self._scored = {}, {}
        if age := batch.age(self.policy_version):
            metrics["mismatch/age_mean"] = age
        differs = self.sampler_differs or age > 0
        self.importance_correction = importance_correction_of(self.loss.importance_correction, differs)
        if batch.all_tied and not (batch.rows and (anchored or batch.teaches_values)):
            return metrics | {"learner/updates": 0.0, "time/learn": batch.seconds + time.perf_counter() - started}
        taught, self.head_seconds = teaching(self.policy, self.mtp, batch.rows, step, batch.draft_gain), 0.0
        rows = self._rows_that_count(batch.rows, anchored, taught)
        self.balancer.begin(rows)
        # The loss and its parts are summands over the whole step; everything else is a mean over the tokens read.
        tokens_read = sum(tokens_in_loss(row.samples, self.loss) for row in rows)
        read = batch.num_completion_tokens / max(tokens_read, 1)
        minis = list(self._shared(rows))
        old: list[Tensor] | None = None
        for update in range(self.options.updates_per_batch):
            self.update.zero()
            sums: Counter[str] = Counter()
            farthest = 0.0
            logprobs, top = self._look_ahead(minis, update)
            old = old or logprobs  # of the policy that sampled, for every update
            for i, mini in enumerate(minis):
                began = time.perf_counter()
                own_sums = Counter[str]()
                with self.likelihood.replaying(mini):
                    out = self.likelihood.forward(mini)
                    loss, parts = self._policy_loss(mini, out, batch, old[i] if old else None, top)
                    far = parts.pop("mismatch/logprob_abs_max")
                    own_sums.update({n: part * (1.0 if n.startswith("loss/") else read) for n, part in parts.items()})
                    loss = loss + out.balance
                    own_sums["loss/total"] += loss.item()
                    loss = loss + self._value_loss(mini, out, batch, own_sums)
                    loss = loss + self._head_loss(mini, out, taught if update == 0 else {}, own_sums)
                    if mini.learns or update == 0:
                        self.update.backward(loss * mini.counts, step, self.ranks)
                self.head_seconds += 0.0 if mini.learns else time.perf_counter() - began
                if mini.counts:
                    if update == 0:
                        self._remember(mini, out.logprobs)
                    sums.update(own_sums)
                    farthest = max(farthest, far)
                if on_micro_batch:
                    on_micro_batch(update * len(minis) + i + 1, len(minis) * self.options.updates_per_batch)
            metrics |= self.ranks.sum_metrics(dict(sums) | {"mismatch/logprob_abs_max": farthest}) | self._update(step)
            self.policy_version += update == 0
        self._scored = self.ranks.union(self._scored)
        self.policy_logprobs = by_completion(batch.rows, self._scored)
        metrics["policy/step_kl"] = self.likelihood.moved(rows, self._scored)
        self.balancer.sum_over(self.ranks)
        metrics |= self.balancer.end()
        metrics |= {"time/draft_head": self.head_seconds} if taught else {}
        metrics["learner/updates"] = float(self.options.updates_per_batch)
        return metrics | {"time/learn": batch.seconds + time.perf_counter() - started}

    def _remember(self, mini: MicroBatch, logprobs_CL: Tensor) -> None:
        for sample, values in zip(mini.samples, logprobs_CL.tolist(), strict=True):
            self._scored[sample.index, sample.start] = values[: len(sample.token_ids)]

    def _rows_that_count(
        self, rows: Sequence[PackedRow], anchored: bool, taught: Mapping[int, float]
    ) -> list[PackedRow]:
        """A tied group's loss is zero: it is spared if nothing needs it, or its gradient where it teaches the head."""
        needed = anchored or self.value_head is not None or self.loss.top_entropy_quantile < 1
        needed |= own.aggregate_of(self.loss.loss_type) == "bnpo"  # which counts the tokens of its micro-batch
        spares = not needed and self.ranks.readers == 1  # several go through the same layers together
        rows = [row for row in rows if needed or not row.tied or row.group in taught]
        return [replace(row, learns=False) if spares and row.tied else row for row in rows]

    def sft_step(self, rows: Sequence[PackedRow], step: int) -> dict[str, float]:
        """One supervised step: mean −log π over the solutions' tokens, the MTP head beside it."""
        rows = [replace(row, group=i) for i, row in enumerate(rows)]
        taught = teaching(self.policy, self.mtp, rows, step)
        tokens = sum(row.num_completion_tokens for row in rows)
        self.update.zero()
        sums: Counter[str] = Counter()
        self.balancer.begin(rows)
        for mini in self._shared(rows):
            out = self.likelihood.forward(mini)
            loss = -out.logprobs.sum() / tokens
            own_sums = Counter({"loss/sft": loss.item()})
            head = self._head_loss(mini, out, taught, own_sums)
            self.update.backward((loss + out.balance + head) * mini.counts, step, self.ranks)
            sums.update(own_sums if mini.counts else {})
        metrics = self.ranks.sum_metrics(sums) | self._update(step)
        self.balancer.sum_over(self.ranks)
        return metrics | self.balancer.end()

    def _update(self, step: int) -> dict[str, float]:
        modules = (self.policy.trunk, self.policy.mtp, self.value_head)
        metrics, norms = self.update.make(step, self.ranks, modules)
        return metrics if self.value_head is None else metrics | {"value/grad_norm": norms[-1]}

    def _shared(self, rows: Sequence[PackedRow]) -> Iterator[MicroBatch]:
        """The micro-batches of this rank. All ranks gather weights together, so one that has fewer than another gets
        some that count nothing."""
        most, ranks = self.options.tokens_per_micro_batch, self.ranks
        numbers = [sum(1 for _ in cut(ranks.share(rows, reader), most)) for reader in range(ranks.readers)]
        yield from micro_batches(ranks.share(rows), most, self.policy.device)
        for _ in range(max(numbers) - numbers[ranks.reader]):
            shortest = min(rows, key=lambda row: row.length)
            yield replace(collate([shortest], self.policy.device), counts=False)

    # ---- its losses, each a summand over the step ------------------------------------------------------------------

    @torch.no_grad()
    def _look_ahead(self, minis: Sequence[MicroBatch], update: int) -> tuple[list[Tensor] | None, TopEntropy | None]:
        """What an update must know of all micro-batches before the first: log π_old, and which entropies are top."""
        selective = self.loss.top_entropy_quantile < 1
        several = update == 0 and self.options.updates_per_batch > 1
        if not (selective or several):
            return None, None
        logprobs, entropies = [], []
        for mini in minis:
            with self.likelihood.replaying(mini):
                out = self.likelihood.forward(mini)
            logprobs.append(out.logprobs)
            entropies += [out.entropy[self._mask(mini)].cpu()] if mini.counts else []
        top = None
        if selective:
            read = [entropy for part in self.ranks.gather(entropies) for entropy in part]
            top = top_entropy_of(torch.cat([torch.zeros(0), *read]), self.loss.top_entropy_quantile)
        return logprobs if several else None, top

    def _mask(self, mini: MicroBatch) -> Tensor:
        """[C, L]: the tokens in the loss."""
        if not self.loss.mask_truncated_completions:
            return mini.mask
        return mask_truncated_completions(mini.mask, [sample.finish_reason for sample in mini.samples])

    def _policy_loss(
        self, mini: MicroBatch, out: Forward, batch: TrainingBatch, old: Tensor | None, top: TopEntropy | None
    ) -> tuple[Tensor, dict[str, float]]:
        options, mask = self.loss, self._mask(mini)
        sampling = mini.padded([sample.sampling_logprobs for sample in mini.samples])
        old = out.logprobs.detach() if old is None else old
        advantages, term = mini.advantages, 0.0
        taught: dict[str, float] = {}
        if self.teacher:
            given = self.likelihood, mini, out, mask, old, batch.num_completion_tokens
            advantages, term, taught = self.teacher.teach(*given)
        loss, metrics = policy_loss(
            out.logprobs,
            old,
            advantages,
            mask,
            options,
            num_sequences=batch.num_samples,
            num_completion_tokens=batch.num_completion_tokens,
            reference_logprobs=self.likelihood.of_reference(mini) if options.beta else None,
            sampling_logprobs=sampling,
            correction=self.importance_correction,
            entropy=out.entropy if options.entropy_coef or options.top_entropy_quantile < 1 else None,
            top_entropy=top,
            max_completion_length=self.max_completion_tokens or None,
        )
        farthest = (old - sampling).masked_fill(~mask, 0.0).abs().max().item()
        return loss + term, {n: float(v) for n, v in metrics.items()} | {"mismatch/logprob_abs_max": farthest, **taught}

    def _value_loss(self, mini: MicroBatch, out: Forward, batch: TrainingBatch, sums: Counter[str]) -> Tensor:
        """PPO's clipped value loss on the hidden states of this forward; zero without a value head."""
        if self.value_head is None:
            return out.preceding.new_zeros(())
        loss, metrics = head_value_loss(self.value_head, self.value, mini, out.preceding, self._mask(mini), batch)
        sums.update({name: float(value) for name, value in metrics.items()})
        return self.value.vf_coef * loss

    def _head_loss(self, mini: MicroBatch, out: Forward, taught: Mapping[int, float], sums: Counter[str]) -> Tensor:
        began, together = time.perf_counter(), self.ranks.readers > 1
        loss = head_loss(self.policy, self.mtp, mini, out.preceding, taught, self.temperature, together)
        if loss is None:
            return out.preceding.new_zeros(())
        sums["loss/mtp_tv" if self.mtp.tv else "loss/mtp"] += loss.item()
        self.head_seconds += time.perf_counter() - began if mini.learns else 0.0
        return loss

    def set_draft_depth(self, depth: int) -> None:
        """Unroll the head to this depth from now on."""
        self.mtp = self.mtp.model_copy(update={"depth": depth})

    # ---- weights and state --------------------------------------------------------------------------------------

    def weights(self) -> Publication:
        """What is published: to be read before the next step."""
        return self.policy.publication()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """What a checkpoint keeps; see state.py."""
        counters = {"policy_version": self.policy_version, "skipped_in_a_row": self.skipped_in_a_row}
        return learner_state.take(*self._stateful), counters

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
        """The inverse of `state`. Raises ValueError naming what does not fit."""
        learner_state.put(tensors, *self._stateful)
        self.policy_version, self.skipped_in_a_row = state["policy_version"], state["skipped_in_a_row"]

    @property
    def _stateful(self) -> tuple[Policy, MasterWeights, torch.optim.Optimizer, Policy | None, ValueHead | None]:
        return self.policy, self.masters, self.optimizer, self.reference, self.value_head
