"""Balancing the experts of the policy that learns: auxiliary losses, the expert bias, and what every step logs.

Everything counts the completions' tokens, each once: prompts are given, and a prompt's tokens stand in more rows when
its group is cut for memory. So bias, sequence loss and statistics do not depend on how a step is cut into
micro-batches. The entropy regulariser does: its mean gate is that of a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grpo.config.run import BalanceOptions
from grpo.learner.batch import MicroBatch, PackedRow
from policies.balance import entropy, entropy_regulariser, gates, load_statistics, move_bias, sequence_loss
from policies.moe import RoutingRecorder, routers
from policies.policy import Policy


class Balancer:
    """One step is `begin`, `observe` for every micro-batch that learns, `end`.

    The bias moves in `end` alone, behind the last update of the step: rollouts, old log-probabilities and every update
    of a step choose experts with the same one.
    """

    def __init__(self, policy: Policy, options: BalanceOptions) -> None:
        self.options = options
        self.routers = routers(policy.trunk)
        self.first_bias: list[Tensor] = []
        if not self.routers:
            for name, value in options:
                if value:
                    raise ValueError(f"balance.{name}={value}, but this policy has no routed experts; set it to 0")
            return
        self.top_k, self.experts = policy.config.num_experts_per_tok, policy.config.n_routed_experts
        for router in self.routers.values():  # bfloat16 would round a step of 0.001 away
            router.e_score_correction_bias.data = router.e_score_correction_bias.data.float()
        self.first_bias = [router.e_score_correction_bias.clone() for router in self.routers.values()]
        self.begin([])

    @property
    def trains(self) -> bool:
        """There is a loss, so tied groups have something to teach."""
        return bool(self.options.entropy_weight or self.options.sequence_weight)

    def begin(self, rows: Sequence[PackedRow]) -> None:
        """Start a step that reads these rows."""
        if not self.routers:
            return
        self.tokens = sum(row.num_completion_tokens for row in rows)
        self.sequences = sum(len(row.samples) for row in rows)
        device = next(iter(self.routers.values())).weight.device
        self.counts = torch.zeros(len(self.routers), self.experts, dtype=torch.long, device=device)
        self.entropies = torch.zeros(len(self.routers), device=device)
        self.sums: Counter[str] = Counter()

    def observe(self, routing: RoutingRecorder, mini: MicroBatch) -> Tensor:
        """Count what the routers chose; returns the auxiliary losses, a summand over the step, layers added up."""
        total = torch.zeros((), device=mini.mask.device)
        if not self.routers:
            return total
        scored = mini.scored.flatten()
        completion_N = torch.arange(len(mini.mask), device=scored.device).repeat_interleave(mini.mask.sum(1))
        for layer, (logits, experts) in enumerate(zip(routing.logits, routing.experts, strict=True)):
            logits_NE = logits[scored]
            gates_NE = gates(logits_NE)
            self.counts[layer] += torch.bincount(experts[scored].flatten(), minlength=self.experts)
            self.entropies[layer] += entropy(gates_NE.detach()).sum()
            if self.options.entropy_weight:
                loss = entropy_regulariser(gates_NE) * len(gates_NE) / self.tokens
                total = total + self._weighted("entropy", loss)
            if self.options.sequence_weight:
                each = sequence_loss(logits_NE, completion_N, len(mini.mask), self.top_k)
                total = total + self._weighted("sequence", each.sum() / self.sequences)
        return total

    def _weighted(self, name: str, loss: Tensor) -> Tensor:
        self.sums[f"loss/balance_{name}"] += loss.item() / len(self.routers)
        return getattr(self.options, f"{name}_weight") * loss

    @torch.no_grad()
    def end(self) -> dict[str, float]:
        """Move the bias by the whole step's counts; returns the step's statistics."""
        if not self.routers:
            return {}
        if self.options.bias_rate:
            for router, counts_E in zip(self.routers.values(), self.counts, strict=True):
                bias = router.e_score_correction_bias
                bias.copy_(move_bias(bias, counts_E, self.options.bias_rate))
        read = self.counts.sum(1) / self.top_k  # tokens, once for every update
        metrics = load_statistics(self.counts, self.entropies / read, list(self.routers))
        updates = read[0].item() / self.tokens
        return metrics | {name: value / updates for name, value in self.sums.items()}

    @contextmanager
    def as_at_first(self) -> Iterator[None]:
        """The reference of a LoRA run is the policy at step 0: base weights, and the bias that it had."""
        biases = [router.e_score_correction_bias for router in self.routers.values()]
        now = [bias.clone() for bias in biases]
        for bias, first in zip(biases, self.first_bias, strict=True):
            bias.copy_(first)
        try:
            yield
        finally:
            for bias, current in zip(biases, now, strict=True):
                bias.copy_(current)
