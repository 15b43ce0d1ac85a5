"""Balancing the experts and dynamic heads of the policy that learns: auxiliary losses, biases, what every step logs.

Everything counts the completions' tokens, each once: prompts are given, and a prompt's tokens are in more rows when
its group is cut for memory. So bias, sequence loss and statistics do not depend on how a step is cut into
micro-batches. The entropy regulariser does: its mean choice is that of a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from grpo.config.learner import BalanceOptions
from grpo.learner.batch import MicroBatch, PackedRow
from grpo.learner.parallel import Ranks
from policies.policy import Policy
from policies.routing.balance import entropy, entropy_regulariser, gates, load_statistics, move_bias, sequence_loss
from policies.routing.routers import Part, RoutingRecorder, routers

PREFIX: dict[Part, str] = {"mlp": "moe", "self_attn": "heads"}  # of the names of metrics


class Balancer:
    """Of the experts, and of the attention heads where these are dynamic. One step is `begin`, `observe` for every
    micro-batch that learns, `end`.

    The bias moves in `end` alone, after the last update of the step: rollouts, old log-probabilities and every update
    of a step choose experts with the same one.
    """

    def __init__(self, policy: Policy, options: BalanceOptions) -> None:
        self.options = options
        self.loads = [Load(part, found, options) for part in PREFIX if (found := routers(policy.trunk, part))]
        if not self.loads:
            for name, value in options:
                if value:
                    raise ValueError(f"balance.{name}={value}, but this policy has no routed experts; set it to 0")
        self.begin([])

    @property
    def trains(self) -> bool:
        """There is a loss, so tied groups have something to teach."""
        return bool(self.options.entropy_weight or self.options.sequence_weight)

    def begin(self, rows: Sequence[PackedRow]) -> None:
        """Start a step that reads these rows."""
        for load in self.loads:
            load.begin(sum(row.num_completion_tokens for row in rows), sum(len(row.samples) for row in rows))

    @contextmanager
    def recording(self, policy: Policy) -> Iterator[list[RoutingRecorder]]:
        """What the routers choose in a forward of `policy`, for `observe`."""
        with ExitStack() as stack:
            yield [stack.enter_context(RoutingRecorder(policy.trunk, load.part)) for load in self.loads]

    def observe(self, records: Sequence[RoutingRecorder], mini: MicroBatch) -> Tensor:
        """Count what the routers chose; returns the auxiliary losses, a summand over the step, layers added up."""
        total = torch.zeros((), device=mini.mask.device)
        for load, routing in zip(self.loads, records, strict=True):
            total = total + load.observe(routing, mini)
        return total

    def sum_over(self, ranks: Ranks) -> None:
        """What this step has counted becomes what all ranks have counted."""
        for load in self.loads:
            ranks.sum_tensors(load.counts, load.entropies)
            load.sums = Counter(ranks.sum_metrics(load.sums))

    def end(self) -> dict[str, float]:
        """Move the biases by the whole step's counts; returns the step's statistics."""
        return {name: value for load in self.loads for name, value in load.end().items()}

    @contextmanager
    def as_at_first(self) -> Iterator[None]:
        """The reference of a LoRA run is the policy at step 0: base weights, and the biases that it had."""
        biases = [router.e_score_correction_bias for load in self.loads for router in load.routers.values()]
        firsts = [bias for load in self.loads for bias in load.first_bias]
        now = [bias.clone() for bias in biases]
        for bias, first in zip(biases, firsts, strict=True):
            bias.copy_(first)
        try:
            yield
        finally:
            for bias, current in zip(biases, now, strict=True):
                bias.copy_(current)


class Load:
    """What the routers of one part of every layer choose in a step."""

    def __init__(self, part: Part, found: Mapping[int, DeepseekV3TopkRouter], options: BalanceOptions) -> None:
        self.part, self.routers, self.options = part, found, options
        first = next(iter(found.values()))
        self.top_k, self.experts = first.top_k, first.num_experts
        for router in found.values():  # bfloat16 would round a step of 0.001 away
            router.e_score_correction_bias.data = router.e_score_correction_bias.data.float()
        self.first_bias = [router.e_score_correction_bias.clone() for router in found.values()]

    def begin(self, tokens: int, sequences: int) -> None:
        self.tokens, self.sequences = tokens, sequences
        device = next(iter(self.routers.values())).weight.device
        self.counts = torch.zeros(len(self.routers), self.experts, dtype=torch.long, device=device)
        self.entropies = torch.zeros(len(self.routers), device=device)
        self.sums: Counter[str] = Counter()

    def observe(self, routing: RoutingRecorder, mini: MicroBatch) -> Tensor:
        total = torch.zeros((), device=mini.mask.device)
        scored = mini.scored.flatten()
        biases = [router.e_score_correction_bias for router in self.routers.values()]
        completion_N = torch.arange(len(mini.mask), device=scored.device).repeat_interleave(mini.mask.sum(1))
        for layer, (logits, experts) in enumerate(zip(routing.logits, routing.experts, strict=True)):
            logits_NE = logits[scored]
            self.counts[layer] += torch.bincount(experts[scored].flatten(), minlength=self.experts)
            self.entropies[layer] += entropy(gates(logits_NE.detach())).sum()
            if self.options.entropy_weight:
                loss = entropy_regulariser(logits_NE, biases[layer], self.top_k) * len(logits_NE) / self.tokens
                total = total + self._weighted("entropy", loss)
            if self.options.sequence_weight:
                each = sequence_loss(logits_NE, completion_N, len(mini.mask), self.top_k)
                total = total + self._weighted("sequence", each.sum() / self.sequences)
        return total

    def _weighted(self, name: str, loss: Tensor) -> Tensor:
        kind = "" if self.part == "mlp" else "heads_"
        self.sums[f"loss/balance_{kind}{name}"] += loss.item() / len(self.routers)
        return getattr(self.options, f"{name}_weight") * loss

    @torch.no_grad()
    def end(self) -> dict[str, float]:
        if self.options.bias_rate:
            for router, counts_E in zip(self.routers.values(), self.counts, strict=True):
                bias = router.e_score_correction_bias
                bias.copy_(move_bias(bias, counts_E, self.options.bias_rate))
        read = self.counts.sum(1) / self.top_k  # tokens, once for every update
        metrics = load_statistics(self.counts, self.entropies / read, list(self.routers), PREFIX[self.part])
        updates = read[0].item() / self.tokens
        return metrics | {name: value / updates for name, value in self.sums.items()}
