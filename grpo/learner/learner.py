"""The GRPO learner: advantages in, one optimizer step out.

One step of GRPO, as told by the code below:
1. score every completion against its group (`prepare`),
2. compute the log-probabilities of what was sampled, under the policy that learns (`_forward`),
3. raise those with a positive advantage, lower the others, no further than the clip allows (`policy_loss`),
4. teach the MTP head, on the same hidden states, to predict what the policy would say next (`draft_loss`).
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.algorithm.advantages import rank_softmax_weights
from grpo.algorithm.losses import entropy_threshold, mask_truncated_completions, policy_loss, value_loss
from grpo.algorithm.surrogates import CorrectionMode
from grpo.config.run import BalanceOptions, LearnerOptions, LossOptions, MTPOptions, ValueOptions
from grpo.learner import state as learner_state
from grpo.learner.batch import MicroBatch, PackedRow, TrainingBatch, micro_batches
from grpo.learner.estimator import in_loss, pack, tokens_in_loss
from grpo.learner.experts import Balancer
from grpo.learner.gold_draft_loss import gold_draft_loss
from grpo.learner.master_weights import MasterWeights
from grpo.learner.optimizer import freeze_exact_parts, parameter_groups
from grpo.learner.parallel import ALONE, Ranks
from grpo.learner.value import ValueHead, with_token_advantages
from policies.logprobs import logprobs_from_hidden
from policies.lora import adapter_off, has_adapter
from policies.moe import RoutingRecorder
from policies.mtp import draft_loss
from policies.policy import Policy
from policies.routing_replay import RoutingReplay
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from rewards.scorer import GroupScore

CHUNK_ELEMENTS = 1 << 22  # logits held at once when log-probabilities are computed


class NonFiniteStep(RuntimeError):
    """Loss or gradient is NaN or infinite. No step was taken."""


@dataclass
class Forward:
    """What one forward of a micro-batch gives: log-probabilities [C, L] and the states the MTP head learns from."""

    logprobs: Tensor
    entropy: Tensor
    preceding: Tensor  # [B, T, D] the hidden state that predicts each token
    balance: Tensor  # the balance losses, a summand over the step


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
        sampler_differs: bool | None = None,  # in precision or version; None: it does below fp32
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.policy, self.options, self.mtp = policy, options, mtp
        self.loss, self.value = loss or LossOptions(), value or ValueOptions()
        self.temperature, self.max_completion_tokens = temperature, max_completion_tokens
        self.reward_weights = reward_weights or {}
        self.balancer = Balancer(policy, balance or BalanceOptions())
        self.policy_version = 0
        self.updates = 0  # made by this object: whether it has moved
        self.skipped_in_a_row = 0
        self.schedule = schedule or (lambda step: 1.0)
        freeze_exact_parts(policy)
        if options.gradient_checkpointing:
            policy.trunk.gradient_checkpointing_enable({"use_reentrant": False})
            for module in policy.trunk.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True  # else transformers ignores it; what is inside (dropout) stays in eval mode
        self.reference: Policy | None = None
        if self.loss.beta > 0 and not has_adapter(policy.trunk):
            self.reference = copy.deepcopy(policy).requires_grad_(False)
        differs = policy.trunk.dtype != torch.float32 if sampler_differs is None else sampler_differs
        self.importance_correction = _importance_correction(self.loss.importance_correction, differs)
        self.value_head: ValueHead | None = None
        if self.loss.advantage in ("gae", "rank_softmax"):
            self.value_head = ValueHead(policy.config.hidden_size, self.value.hidden_size).to(policy.device)
        self.masters = MasterWeights(policy)
        groups = parameter_groups(policy, learning_rate or options.learning_rate, options.weight_decay, mtp)
        if self.value_head is not None:
            rate = self.value.learning_rate
            groups.append({"params": list(self.value_head.parameters()), "lr": rate, "peak": rate, "weight_decay": 0.0})
        for group in groups:
            group["params"] = [self.masters.of(parameter) for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=options.betas, fused=True)  # no temporaries

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
        return batch if self.value_head is None else self._with_values(batch, scores)

    @torch.no_grad()
    def _with_values(self, batch: TrainingBatch, scores: Sequence[GroupScore]) -> TrainingBatch:
        """Advantages of every token, from the values that the states had when they were sampled."""
        assert self.value_head is not None
        started = time.perf_counter()
        values: dict[int, Tensor] = {}
        for mini in self._micro_batches(batch.rows):
            with self._replaying(mini):
                values_CL = mini.by_completion(self.value_head(self._preceding(mini)[mini.scored]))
            values |= {s.index: values_CL[c, : len(s.token_ids)] for c, s in enumerate(mini.samples)}
        rewards_PG = [score.rewards for score in scores]
        weights_PG = None
        if self.loss.advantage == "rank_softmax":
            weights_PG = rank_softmax_weights(rewards_PG, self.value.rank_temperature)
        left_out = [s.index for row in batch.rows for s in row.samples if not in_loss(s, self.loss)]
        batch = with_token_advantages(batch, values, rewards_PG, self.value, weights_PG=weights_PG, left_out=left_out)
        return replace(batch, seconds=time.perf_counter() - started)

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(
        self,
        batch: TrainingBatch,
        step: int,
        on_micro_batch: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """One or several optimizer updates on a batch of rollouts. Raises NonFiniteStep instead of an update.

        A batch in which every advantage is zero changes nothing, not even momentum, and says so in its metrics.
        """
        started = time.perf_counter()
        anchored = self.loss.beta > 0 or self.loss.entropy_coef != 0 or self.balancer.trains
        metrics: dict[str, float] = dict(batch.metrics)
        if batch.all_tied and not (anchored and batch.rows):
            return metrics | {"learner/updates": 0.0, "time/learn": batch.seconds + time.perf_counter() - started}
        teaching = self._teaching(batch.rows, step)
        # A tied group's loss is exactly zero: unless something else needs its forward, it is spared.
        needed = anchored or self.value_head is not None or self.loss.top_entropy_quantile < 1
        needed |= self.loss.loss_type == "bnpo"  # which counts the tokens of its micro-batch
        rows = [row for row in batch.rows if needed or not row.tied or id(row) in teaching]
        self.balancer.begin(rows)
        batch.tokens_read = sum(tokens_in_loss(row.samples, self.loss) for row in rows)
        minis = list(self._micro_batches(self.ranks.share(rows)))
        old: list[Tensor] | None = None
        for update in range(self.options.updates_per_batch):
            self.optimizer.zero_grad(set_to_none=True)
            sums: Counter[str] = Counter()
            farthest = 0.0
            logprobs, threshold = self._look_ahead(minis, update)
            old = old or logprobs  # of the policy that sampled, for every update
            for i, mini in enumerate(minis):
                with self._replaying(mini):
                    out = self._forward(mini)
                    loss, parts = self._policy_loss(mini, out, batch, old[i] if old else None, threshold)
                    farthest = max(farthest, parts.pop("mismatch/logprob_abs_max"))
                    sums.update(parts)
                    loss = loss + out.balance
                    sums["loss/total"] += loss.item()
                    loss = loss + self._value_loss(mini, out, batch, sums)
                    if update == 0:
                        loss = loss + self._head_loss(mini, out, teaching, sums)
                    self._backward(loss, step)
                if on_micro_batch:
                    on_micro_batch(update * len(minis) + i + 1, len(minis) * self.options.updates_per_batch)
            metrics |= self.ranks.sum_metrics(dict(sums) | {"mismatch/logprob_abs_max": farthest}) | self._update(step)
            self.policy_version += update == 0
        self.ranks.sum_balance(self.balancer)
        metrics |= self.balancer.end()
        metrics["learner/updates"] = float(self.options.updates_per_batch)
        return metrics | {"time/learn": batch.seconds + time.perf_counter() - started}

    def _backward(self, loss: Tensor, step: int) -> None:
        if self.ranks.size == 1 and not math.isfinite(loss.item()):  # with several, the summed gradient tells all
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteStep(f"step {step}: the loss is {loss.item()}")
        self.masters.backward(loss)

    def _teaching(self, rows: Sequence[PackedRow], step: int) -> dict[int, float]:
        """The rows that the MTP head learns from at this step, by id, with the weight of each of their tokens."""
        if self.policy.mtp is None or self.mtp.loss_weight == 0 or step % self.mtp.every:
            return {}
        stride = round(1 / self.mtp.share)
        groups = list(dict.fromkeys(id(row.prompt_ids) for row in rows))  # rows of one group share its prompt
        taught = groups[step // self.mtp.every % stride :: stride] or groups[:1]
        chosen = [row for row in rows if id(row.prompt_ids) in taught]
        weight = self.mtp.loss_weight / sum(row.num_completion_tokens for row in chosen)
        return {id(row): weight for row in chosen}

    def _update(self, step: int) -> dict[str, float]:
        self.ranks.sum_gradients(tensor for group in self.optimizer.param_groups for tensor in group["params"])
        norm, head_norm, value_norm = (
            self._clip(module) for module in (self.policy.trunk, self.policy.mtp, self.value_head)
        )
        if not math.isfinite(norm + head_norm + value_norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteStep(
                f"step {step}: the gradient norm is {norm} (MTP head: {head_norm}, value head: {value_norm})"
            )
        scale = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        self.optimizer.step()
        self.masters.write_back()
        self.updates += 1
        metrics = {"learner/grad_norm": norm, "learner/learning_rate": self.optimizer.param_groups[0]["lr"]}
        return metrics if self.value_head is None else metrics | {"value/grad_norm": value_norm}

    def _clip(self, module: nn.Module | None) -> float:
        """Clip the gradient of what the optimizer moves in place of a module's parameters; returns its norm before."""
        moved = [self.masters.of(parameter) for parameter in module.parameters()] if module is not None else []
        moved = [tensor for tensor in moved if tensor.grad is not None]
        return nn.utils.clip_grad_norm_(moved, self.options.max_grad_norm).item() if moved else 0.0

    def _micro_batches(self, rows: Sequence[PackedRow]) -> Iterator[MicroBatch]:
        return micro_batches(rows, self.options.tokens_per_micro_batch, self.policy.device)

    def _replaying(self, mini: MicroBatch) -> RoutingReplay:
        """Policy and reference alike, so that the KL between them starts at zero."""
        policies = [self.policy] if self.reference is None else [self.policy, self.reference]
        return RoutingReplay([policy.trunk for policy in policies], mini.routing)

    def _preceding(self, mini: MicroBatch, policy: Policy | None = None) -> Tensor:
        """[B, T, D] the hidden state that predicts each token."""
        hidden = (policy or self.policy).hidden(mini.token_ids, mini.position_ids, mini.visible, mini.packing)
        return hidden.gather(1, mini.before[..., None].expand_as(hidden))

    def _forward(self, mini: MicroBatch, policy: Policy | None = None) -> Forward:
        policy = policy or self.policy
        with RoutingRecorder(policy.trunk) as routing:
            preceding = self._preceding(mini, policy)
        balance = preceding.new_zeros(())
        if torch.is_grad_enabled():  # not for old and reference log-probabilities
            balance = self.balancer.observe(routing, mini)
        logprobs, entropy = logprobs_from_hidden(
            preceding[mini.scored],
            policy.lm_head,
            mini.token_ids[mini.scored],
            self.temperature,
            chunk=max(1, CHUNK_ELEMENTS // policy.lm_head.shape[0]),
            entropy_grad=self.loss.entropy_coef != 0,
        )
        return Forward(mini.by_completion(logprobs), mini.by_completion(entropy), preceding, balance)

    @torch.no_grad()
    def _look_ahead(self, minis: Sequence[MicroBatch], update: int) -> tuple[list[Tensor] | None, Tensor | None]:
        """What an update must know of all micro-batches before the first: log π_old, and where top entropy begins."""
        selective = self.loss.top_entropy_quantile < 1
        several = update == 0 and self.options.updates_per_batch > 1
        if not (selective or several):
            return None, None
        logprobs, entropies = [], []
        for mini in minis:
            with self._replaying(mini):
                out = self._forward(mini)
            logprobs.append(out.logprobs)
            entropies.append(out.entropy[self._mask(mini)])
        threshold = None
        if selective:
            threshold = entropy_threshold(self.ranks.gather(entropies), self.loss.top_entropy_quantile)
        return logprobs if several else None, threshold

    def _mask(self, mini: MicroBatch) -> Tensor:
        """[C, L]: the tokens in the loss."""
        if not self.loss.mask_truncated_completions:
            return mini.mask
        return mask_truncated_completions(mini.mask, [sample.finish_reason for sample in mini.samples])

    @torch.no_grad()
    def _reference_logprobs(self, mini: MicroBatch) -> Tensor | None:
        """Adapters off, or the frozen copy: both equal the policy at step 0, so the KL starts at zero."""
        if self.loss.beta == 0:
            return None
        if self.reference is not None:
            return self._forward(mini, self.reference).logprobs
        with adapter_off(self.policy.trunk), self.balancer.as_at_first():
            return self._forward(mini).logprobs

    def _policy_loss(
        self, mini: MicroBatch, out: Forward, batch: TrainingBatch, old: Tensor | None, threshold: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        options, mask = self.loss, self._mask(mini)
        sampling = mini.padded([sample.sampling_logprobs for sample in mini.samples])
        old = out.logprobs.detach() if old is None else old
        loss, metrics = policy_loss(
            out.logprobs,
            old,
            mini.advantages,
            mask,
            num_sequences=batch.num_samples,
            num_completion_tokens=batch.num_completion_tokens,
            loss_type=options.loss_type,
            importance_sampling_level=options.importance_sampling_level,
            epsilon=options.epsilon,
            epsilon_high=options.epsilon_high,
            delta=options.delta,
            beta=options.beta,
            kl_estimator=options.kl_estimator,
            reference_logprobs=self._reference_logprobs(mini),
            sampling_logprobs=sampling,
            importance_sampling_mode=self.importance_correction,
            importance_sampling_clip_max=options.importance_clip_max,
            importance_sampling_clip_min=options.importance_clip_min,
            sapo_temperature_pos=options.sapo_temperature_pos,
            sapo_temperature_neg=options.sapo_temperature_neg,
            entropy=out.entropy if options.entropy_coef or options.top_entropy_quantile < 1 else None,
            entropy_coef=options.entropy_coef,
            top_entropy_quantile=options.top_entropy_quantile,
            top_entropy_threshold=threshold,
            max_completion_length=self.max_completion_tokens or None,
        )
        # The loss and its parts are summands over the whole step; everything else is a mean over the tokens read.
        read = batch.num_completion_tokens / max(batch.tokens_read, 1)
        scaled = {name: float(v) * (1.0 if name.startswith("loss/") else read) for name, v in metrics.items()}
        farthest = (old - sampling).masked_fill(~mask, 0.0).abs().max().item()
        return loss, scaled | {"mismatch/logprob_abs_max": farthest}

    def _value_loss(self, mini: MicroBatch, out: Forward, batch: TrainingBatch, sums: Counter[str]) -> Tensor:
        """PPO's clipped value loss on the hidden states of this forward; zero without a value head."""
        if self.value_head is None:
            return out.preceding.new_zeros(())
        states = out.preceding[mini.scored]
        values = mini.by_completion(self.value_head(states if self.value.train_trunk else states.detach()))
        loss, metrics = value_loss(
            values,
            mini.padded([sample.values for sample in mini.samples]),
            mini.padded([sample.returns for sample in mini.samples]),
            self._mask(mini),
            cliprange_value=self.value.cliprange_value,
            num_completion_tokens=batch.num_completion_tokens,
        )
        sums.update({name: float(value) for name, value in metrics.items()})
        return self.value.vf_coef * loss

    def _head_loss(
        self, mini: MicroBatch, out: Forward, teaching: dict[int, float], sums: Counter[str], trunk: bool = False
    ) -> Tensor:
        """The draft loss of the rows that teach; zero where this micro-batch has none. `trunk`: on gold tokens, for
        the trunk too."""
        chosen = [b for b, row in enumerate(mini.rows) if id(row) in teaching]
        if not chosen:
            return out.preceding.new_zeros(())
        policy, preceding = self.policy, out.preceding[chosen]
        chunk = max(1, CHUNK_ELEMENTS // policy.lm_head.shape[0])
        if trunk:
            loss = gold_draft_loss(policy, out.preceding, mini, chosen, self.mtp.depth, chunk)
        else:
            first = min(len(mini.rows[b].prompt_ids) for b in chosen)
            ids, positions, visible = mini.token_ids[chosen], mini.position_ids[chosen], mini.head_visible[chosen]
            outputs = policy.unroll(preceding, ids, positions, visible, self.mtp.depth, first)
            loss = draft_loss(
                outputs,
                preceding,
                mini.segment[chosen],
                policy.lm_head,
                self.temperature,
                chunk,
                draft_ids=policy.draft_ids,
            )
        loss = loss * teaching[id(mini.rows[chosen[0]])]
        sums["loss/mtp"] += loss.item()
        return loss

    def sft_step(self, rows: Sequence[PackedRow], step: int) -> dict[str, float]:
        """One supervised step: mean −log π over the solutions' tokens, the MTP head beside it."""
        teaching = self._teaching(rows, step)
        tokens = sum(row.num_completion_tokens for row in rows)
        self.optimizer.zero_grad(set_to_none=True)
        sums: Counter[str] = Counter()
        self.balancer.begin(rows)
        for mini in self._micro_batches(self.ranks.share(rows)):
            out = self._forward(mini)
            loss = -out.logprobs.sum() / tokens
            sums["loss/sft"] += loss.item()
            head_loss = self._head_loss(mini, out, teaching, sums, trunk=self.mtp.train_trunk)
            self._backward(loss + out.balance + head_loss, step)
        metrics = self.ranks.sum_metrics(sums) | self._update(step)
        self.ranks.sum_balance(self.balancer)
        return metrics | self.balancer.end()

    def set_draft_depth(self, depth: int) -> None:
        """Unroll the head to this depth from now on."""
        self.mtp = self.mtp.model_copy(update={"depth": depth})

    # ---- weights and state --------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        return self.policy.weights()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """What a checkpoint keeps; see learner_state."""
        return learner_state.take(self)

    def load_state(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """The inverse of `state`. Raises ValueError naming what does not fit."""
        learner_state.put(self, tensors, state)


def _importance_correction(option: CorrectionMode | Literal["auto", "none"], differs: bool) -> CorrectionMode | None:
    """Contract 8: what the user chose; by itself, on where sampler and learner differ."""
    if option == "auto":
        return "token_truncate" if differs else None
    return None if option == "none" else option
