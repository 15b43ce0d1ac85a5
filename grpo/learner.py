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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo import advantages as estimators
from grpo.batch import MicroBatch, PackedRow, Sample, TrainingBatch, micro_batches, split_rows
from grpo.config import LearnerOptions, LossOptions, MTPOptions
from grpo.losses import mask_truncated_completions, policy_loss
from grpo.optimizer import freeze_exact_parts, parameter_groups
from policies.logprobs import logprobs_from_hidden
from policies.lora import adapter_off, has_adapter
from policies.moe import RoutingRecorder, load_statistics
from policies.mtp import draft_loss
from policies.policy import Policy
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from rewards.scorer import GroupScore

CHUNK_ELEMENTS = 1 << 24  # logits held at once when log-probabilities are computed


class NonFiniteStep(RuntimeError):
    """Loss or gradient is NaN or infinite. No step was taken."""


@dataclass
class Forward:
    """What one forward of a micro-batch gives: log-probabilities [C, L] and the states the MTP head learns from."""

    logprobs: Tensor
    entropy: Tensor
    preceding: Tensor  # [B, T, D] the hidden state that predicts each token


class Learner:
    """Holds the policy that learns and its optimizer. `policy_version` counts the steps taken."""

    def __init__(
        self,
        policy: Policy,
        options: LearnerOptions,
        mtp: MTPOptions,
        loss: LossOptions | None = None,
        *,
        temperature: float = 1.0,
        max_completion_tokens: int = 0,
        reward_weights: Mapping[str, float] | None = None,
        learning_rate: float | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.policy, self.options, self.mtp = policy, options, mtp
        self.loss = loss or LossOptions()
        self.temperature, self.max_completion_tokens = temperature, max_completion_tokens
        self.reward_weights = reward_weights or {}
        self.expert_counts = torch.zeros((), dtype=torch.long)  # [layers, experts] once a step has begun
        self.policy_version = 0
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
        self.optimizer = torch.optim.AdamW(
            parameter_groups(policy, learning_rate or options.learning_rate, options.weight_decay, mtp),
            betas=options.betas,
        )

    # ---- what a step learns from ------------------------------------------------------------------------------

    def prepare(self, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> TrainingBatch:
        """Advantages by the chosen estimator, groups packed with their prompt once; without reward no place in it."""
        advantages_PG, tied_P = self._advantages(scores)
        rows, tokens, count = [], 0, 0
        budget = self.options.tokens_per_micro_batch
        size = len(groups[0].completions)
        for g, (group, score) in enumerate(zip(groups, scores, strict=True)):
            samples = [
                Sample(g * size + i, c.token_ids, c.logprobs, advantages_PG[g, i].item(), c.finish_reason)
                for i, c in enumerate(group.completions)
                if score.rewards[i] is not None
            ]
            count += len(samples)
            tokens += self._tokens_in_loss(samples)
            if samples:
                rows += split_rows(group.prompt.token_ids, samples, budget)
        return TrainingBatch(rows, advantages_PG, count, tokens, int(tied_P.sum()))

    def _tokens_in_loss(self, samples: Sequence[Sample]) -> int:
        masking = self.loss.mask_truncated_completions
        return sum(len(sample.token_ids) for sample in samples if sample.finish_reason == "stop" or not masking)

    def _advantages(self, scores: Sequence[GroupScore]) -> tuple[Tensor, Tensor]:
        rewards_PG = [score.rewards for score in scores]
        match self.loss.advantage:
            case "rloo":
                return estimators.rloo(rewards_PG)
            case "reinforce_plus_plus":
                return estimators.reinforce_plus_plus(rewards_PG)
            case "reinforce_plus_plus_baseline":
                return estimators.reinforce_plus_plus(rewards_PG, baseline=True)
        if self.loss.multi_objective_aggregation == "sum_then_normalize":
            return estimators.group_relative(rewards_PG, self.loss.scale_rewards)
        parts_PGK = [
            [
                [None if reward is None else score.parts[name][i] for name in self.reward_weights]
                for i, reward in enumerate(score.rewards)
            ]
            for score in scores
        ]
        weights = list(self.reward_weights.values())
        return estimators.multi_objective(parts_PGK, weights, "normalize_then_sum", self.loss.scale_rewards)

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
        anchored = self.loss.beta > 0 or self.loss.entropy_coef != 0
        metrics: dict[str, float] = {}
        if batch.all_tied and not (anchored and batch.rows):
            return {"learner/updates": 0.0, "time/learn": time.perf_counter() - started}
        teaching = self._teaching(batch.rows, step)
        # A tied group's loss is exactly zero: unless something else needs its forward, it is spared.
        rows = [row for row in batch.rows if anchored or not row.tied or id(row) in teaching]
        self.expert_counts = torch.zeros((), dtype=torch.long, device=self.policy.device)
        batch.tokens_read = sum(self._tokens_in_loss(row.samples) for row in rows)
        minis = list(micro_batches(rows, self.options.tokens_per_micro_batch, self.policy.device))
        old = [self._old_logprobs(mini) for mini in minis] if self.options.updates_per_batch > 1 else None
        for update in range(self.options.updates_per_batch):
            self.optimizer.zero_grad(set_to_none=True)
            sums: Counter[str] = Counter()
            for i, mini in enumerate(minis):
                out = self._forward(mini)
                loss, parts = self._policy_loss(mini, out, batch, old[i] if old else None)
                sums.update(parts)
                if update == 0:
                    loss = loss + self._head_loss(mini, out, teaching, sums)
                self._backward(loss, step)
                if on_micro_batch:
                    on_micro_batch(update * len(minis) + i + 1, len(minis) * self.options.updates_per_batch)
            metrics |= dict(sums) | self._update(step)
            self.policy_version += update == 0
        if self.expert_counts.dim():
            metrics |= load_statistics(self.expert_counts)
        metrics["learner/updates"] = float(self.options.updates_per_batch)
        return metrics | {"time/learn": time.perf_counter() - started}

    def _backward(self, loss: Tensor, step: int) -> None:
        if not math.isfinite(loss.item()):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteStep(f"step {step}: the loss is {loss.item()}")
        loss.backward()

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
        trunk = [p for p in self.policy.trunk.parameters() if p.grad is not None]
        head = [p for p in self.policy.mtp.parameters() if p.grad is not None] if self.policy.mtp else []
        norm = nn.utils.clip_grad_norm_(trunk, self.options.max_grad_norm).item()
        head_norm = nn.utils.clip_grad_norm_(head, self.options.max_grad_norm).item() if head else 0.0
        if not math.isfinite(norm + head_norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteStep(f"step {step}: the gradient norm is {norm} (MTP head: {head_norm})")
        scale = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        self.optimizer.step()
        return {"learner/grad_norm": norm, "learner/learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _forward(self, mini: MicroBatch, policy: Policy | None = None) -> Forward:
        policy = policy or self.policy
        with RoutingRecorder(policy.trunk) as routing:
            hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.visible)
        if routing.experts and torch.is_grad_enabled():  # not for old and reference log-probabilities
            scored, count = mini.scored.flatten(), policy.config.n_routed_experts
            counts = [torch.bincount(experts[scored].flatten(), minlength=count) for experts in routing.experts]
            self.expert_counts = self.expert_counts + torch.stack(counts)
        preceding = hidden.gather(1, mini.before[..., None].expand_as(hidden))
        logprobs, entropy = logprobs_from_hidden(
            preceding[mini.scored],
            policy.lm_head,
            mini.token_ids[mini.scored],
            self.temperature,
            chunk=max(1, CHUNK_ELEMENTS // policy.lm_head.shape[0]),
            entropy_grad=self.loss.entropy_coef != 0,
        )
        return Forward(mini.by_completion(logprobs), mini.by_completion(entropy), preceding)

    @torch.no_grad()
    def _old_logprobs(self, mini: MicroBatch) -> Tensor:
        return self._forward(mini).logprobs

    @torch.no_grad()
    def _reference_logprobs(self, mini: MicroBatch) -> Tensor | None:
        """Adapters off, or the frozen copy: both equal the policy at step 0, so the KL starts at zero."""
        if self.loss.beta == 0:
            return None
        with adapter_off(self.policy.trunk) if self.reference is None else nullcontext():
            return self._forward(mini, self.reference).logprobs

    def _policy_loss(
        self, mini: MicroBatch, out: Forward, batch: TrainingBatch, old: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        options, mask = self.loss, mini.mask
        if options.mask_truncated_completions:
            mask = mask_truncated_completions(mask, [sample.finish_reason for sample in mini.samples])
        sampling = mini.padded([sample.sampling_logprobs for sample in mini.samples])
        advantages = torch.tensor([sample.advantage for sample in mini.samples], device=mask.device)
        loss, metrics = policy_loss(
            out.logprobs,
            out.logprobs.detach() if old is None else old,
            advantages,
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
            importance_sampling_mode=None if options.importance_correction == "none" else options.importance_correction,
            importance_sampling_clip_max=options.importance_clip_max,
            importance_sampling_clip_min=options.importance_clip_min,
            sapo_temperature_pos=options.sapo_temperature_pos,
            sapo_temperature_neg=options.sapo_temperature_neg,
            entropy=out.entropy if options.entropy_coef or options.top_entropy_quantile < 1 else None,
            entropy_coef=options.entropy_coef,
            top_entropy_quantile=options.top_entropy_quantile,
            max_completion_length=self.max_completion_tokens,
        )
        # The loss and its parts are summands over the whole step; everything else is a mean over the tokens read.
        read = batch.num_completion_tokens / max(batch.tokens_read, 1)
        return loss, {name: float(v) * (1.0 if name.startswith("loss/") else read) for name, v in metrics.items()}

    def _head_loss(self, mini: MicroBatch, out: Forward, teaching: dict[int, float], sums: Counter[str]) -> Tensor:
        """The draft loss of the rows that teach; zero where this micro-batch has none."""
        chosen = [b for b, row in enumerate(mini.rows) if id(row) in teaching]
        if not chosen:
            return out.preceding.new_zeros(())
        policy, preceding = self.policy, out.preceding[chosen]
        outputs = policy.unroll(
            preceding, mini.token_ids[chosen], mini.position_ids[chosen], mini.head_visible[chosen], self.mtp.depth
        )
        chunk = max(1, CHUNK_ELEMENTS // policy.lm_head.shape[0])
        loss = draft_loss(outputs, preceding, mini.segment[chosen], policy.lm_head, self.temperature, chunk)
        loss = loss * teaching[id(mini.rows[chosen[0]])]
        sums["loss/mtp"] += loss.item()
        return loss

    def sft_step(self, rows: Sequence[PackedRow], step: int) -> dict[str, float]:
        """One supervised step: mean −log π over the solutions' tokens, the MTP head beside it."""
        teaching = self._teaching(rows, step)
        tokens = sum(row.num_completion_tokens for row in rows)
        self.optimizer.zero_grad(set_to_none=True)
        sums: Counter[str] = Counter()
        for mini in micro_batches(rows, self.options.tokens_per_micro_batch, self.policy.device):
            out = self._forward(mini)
            loss = -out.logprobs.sum() / tokens
            sums["loss/sft"] += loss.item()
            self._backward(loss + self._head_loss(mini, out, teaching, sums), step)
        return dict(sums) | self._update(step)

    # ---- weights and state --------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        return self.policy.weights()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """What a checkpoint keeps: trained parameters (adapters as they are), AdamW's moments, counters."""
        trained = {n: p.detach() for n, p in self.policy.named_parameters() if p.requires_grad}
        buffers = {n: b for n, b in self.policy.named_buffers() if n.endswith("e_score_correction_bias")}
        names = {id(p): n for n, p in self.policy.named_parameters()}
        moments = {
            f"{names[id(p)]}/{key}": value for p, state in self.optimizer.state.items() for key, value in state.items()
        }
        tensors = {"policy": trained | buffers, "optimizer": moments}
        if self.reference is not None:
            tensors["reference"] = dict(self.reference.named_parameters())
        return tensors, {"policy_version": self.policy_version, "skipped_in_a_row": self.skipped_in_a_row}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """The inverse of `state`. Raises ValueError naming tensors that do not fit this policy."""
        own = dict(self.policy.named_parameters()) | dict(self.policy.named_buffers())
        wrong = [
            f"{n} {list(t.shape)}" for n, t in tensors["policy"].items() if n not in own or own[n].shape != t.shape
        ]
        if wrong:
            raise ValueError(f"the checkpoint is of another policy: {wrong[:5]} do not fit; check model and lora")
        for name, tensor in tensors["policy"].items():
            own[name].copy_(tensor)
        if self.reference is not None:
            for name, parameter in self.reference.named_parameters():
                parameter.copy_(tensors["reference"][name])
        for name, value in tensors["optimizer"].items():
            owner, key = name.rsplit("/", 1)
            self.optimizer.state[own[owner]][key] = value.clone()
        self.policy_version = state["policy_version"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
