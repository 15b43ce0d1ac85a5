"""Teaching the draft head of a frozen policy: forward KL to the trunk's own distributions, unrolled over the depths.

The trunk reads a batch of rollouts once, without gradient; its hidden states serve every pass over the batch.

FLOPs per token of a pass, with P parameters in the head, depth k and K drafted tokens of V: 6·P·k for the head,
(2 + 4·k)·D·K for the LM head (teacher once, draft and gradient at each depth), and 2·(trunk) / reuse. SmolLM2-135M with
k = 4: 0.12 + 0.51 GFLOP with V = 49,152, 0.12 + 0.09 with K = 8,192, and 0.25 / reuse.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.mtp import HeadOptions
from grpo.learner.batch import MicroBatch, PackedRow
from grpo.learner.learner import Learner
from grpo.learner.optimizer import schedule
from policies.logprobs import CHUNK_ELEMENTS
from policies.mtp import Divergence, draft_loss
from policies.policy import Policy


@dataclass(frozen=True)
class Lesson:
    """A micro-batch, and the trunk's hidden state that precedes each of its tokens [B, T, D]."""

    mini: MicroBatch
    preceding: Tensor

    @property
    def tokens(self) -> int:
        return sum(row.num_completion_tokens for row in self.mini.rows)


class HeadLearner(Learner):
    """A learner whose trunk is frozen: only `policy.mtp` moves, and is all that a checkpoint keeps of the policy."""

    def __init__(self, policy: Policy, options: HeadOptions, *, temperature: float, steps: int, seed: int) -> None:
        policy.trunk.requires_grad_(False)
        super().__init__(
            policy,
            LearnerOptions(
                weight_decay=options.weight_decay,
                max_grad_norm=options.max_grad_norm,
                tokens_per_micro_batch=options.tokens_per_update,
            ),
            MTPOptions(depth=options.depth, learning_rate=options.learning_rate),
            temperature=temperature,
            schedule=schedule(options.schedule, steps, options.warmup_steps),
        )
        self.head_options, self.steps, self.seed = options, steps, seed

    def depth_at(self, step: int) -> int:
        """1 at the first step, then one more in equal parts of the curriculum's steps, and `depth` after them."""
        share = self.head_options.curriculum_share * self.steps
        done = min((step - 1) / share, 1.0) if share else 1.0
        return 1 + int(done * (self.head_options.depth - 1))

    def divergence_at(self, step: int) -> Divergence:
        return "tv" if step > round((1 - self.head_options.tv_share) * self.steps) else "kl"

    @torch.no_grad()
    def read(self, rows: Sequence[PackedRow]) -> list[Lesson]:
        """One forward of the trunk over the batch."""
        return [Lesson(mini, self.likelihood.preceding(mini)) for mini in self._micro_batches(rows)]

    @torch.no_grad()
    def frequent_tokens(self, lessons: Sequence[Lesson], count: int) -> Tensor | None:
        """The `count` tokens that the policy says most often in these rollouts, ascending, all of its stop tokens among
        them; None if that is every token.

        Counts are expected ones, Σ p over the sampled positions: they rank also what was not sampled by chance.
        """
        head, stops = self.policy.lm_head, self.policy.stop_token_ids
        if count >= len(head):
            return None
        mass = torch.zeros(len(head), device=head.device)
        for lesson in lessons:
            for hidden in lesson.preceding[lesson.mini.scored].split(max(1, CHUNK_ELEMENTS // len(head))):
                mass += (torch.nn.functional.linear(hidden, head).float() / self.temperature).softmax(-1).sum(0)
        mass[stops] = float("inf")
        return mass.topk(count).indices.sort().values

    def teach(self, lessons: Sequence[Lesson], step: int) -> dict[str, float]:
        """One optimizer update for every micro-batch, in another order at each pass. Raises NonFiniteStep.

        The loss is that of the first pass, over rollouts that the head has not learned from: in later ones it falls for
        what the head has memorised as well.
        """
        depth, divergence = self.depth_at(step), self.divergence_at(step)
        metrics: dict[str, float] = {}
        losses: list[float] = []
        for number in range(self.head_options.reuse):
            order = list(lessons)
            random.Random(f"reuse/{self.seed}/{step}/{number}").shuffle(order)
            for lesson in order:
                self.update.zero()
                loss = self._lesson_loss(lesson, depth, divergence)
                self.update.backward(loss, step, self.ranks)
                metrics = self._update(step)
                if number == 0:
                    losses.append(loss.item() * lesson.tokens)
        self.policy_version += 1
        return {
            "learner/learning_rate": metrics["learner/learning_rate"],
            "learner/updates": float(len(lessons) * self.head_options.reuse),
            "curriculum/draft_depth": float(depth),
            f"loss/mtp{'_tv' if divergence == 'tv' else ''}": sum(losses) / sum(lesson.tokens for lesson in lessons),
        }

    def _lesson_loss(self, lesson: Lesson, depth: int, divergence: Divergence) -> Tensor:
        """Mean over the completions' tokens."""
        policy, mini = self.policy, lesson.mini
        first = min(len(row.prompt_token_ids) for row in mini.rows)
        outputs = policy.unroll(lesson.preceding, mini.token_ids, mini.position_ids, mini.head_segment, depth, first)
        width = len(policy.lm_head if policy.draft_ids is None else policy.draft_ids)
        loss = draft_loss(
            outputs,
            lesson.preceding,
            mini.turn,
            policy.lm_head,
            self.temperature,
            max(1, CHUNK_ELEMENTS // 4 // width),
            draft_ids=policy.draft_ids,
            divergence=divergence,
        )
        return loss / lesson.tokens

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """With the draft vocabulary, where there is one."""
        tensors, state = super().state()
        return tensors | ({} if self.policy.draft_ids is None else {"draft": {"ids": self.policy.draft_ids}}), state

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
        super().load_state(tensors, state)
        self.policy.draft_ids = tensors["draft"]["ids"].to(self.policy.device) if "draft" in tensors else None
