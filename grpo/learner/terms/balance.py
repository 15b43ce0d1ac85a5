"""Balancing the experts and dynamic heads of the policy that learns: auxiliary losses, biases, what every step logs.

Everything counts the completions' tokens, each once: prompts are given, and a prompt's tokens are in more rows when
its group is cut for memory. So bias, sequence loss and statistics do not depend on how a step is cut into
micro-batches. The entropy regulariser does: its mean choice is that of a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from grpo.config.balance import BalanceOptions
from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward
from grpo.learner.parallel import Ranks
from grpo.learner.row import PackedRow
from grpo.learner.terms.term import Later, Term, Work
from policies.policy import Policy
from policies.routing.balance import entropy, entropy_regulariser, gates, load_statistics, move_bias, sequence_loss
from policies.routing.routers import Part, RoutingRecorder, routers

if TYPE_CHECKING:
    from grpo.config.run import LearningConfig

METRICS = {
    "loss/balance_entropy": "log E - H(mean soft choice), before its weight, mean over layers, nats; 0 is balanced",
    "loss/balance_sequence": "balance loss of a completion, before its weight, mean over layers; 1 is balanced",
    "loss/balance_heads_<name>": "loss/balance_<name> of dynamic heads (active_heads)",
    "moe/load_min": "load of the least used expert / even share, mean over layers; 1 is balanced",
    "moe/load_max": "load of the most used expert / even share, mean over layers; 1 is balanced",
    "moe/max_violation": "moe/load_max - 1",
    "moe/router_entropy": "entropy of a token's gate, mean over tokens and layers, nats; log E is indifference",
    "moe/dead_experts": "experts that no token of the step chose, over all layers, count",
    "moe/layer_<d>/<name>": "moe/<name> of layer d alone",
    "heads/<name>": "moe/<name> of the attention heads that active_heads lets a router choose",
}
PREFIX: dict[Part, str] = {"mlp": "moe", "self_attn": "heads"}  # of the names of metrics


def term(policy: Policy, config: LearningConfig, load: object = None) -> BalanceTerm | None:
    loads = loads_of(policy, config.balance)
    return BalanceTerm(loads, config.balance) if loads else None


def check(policy: Policy, config: LearningConfig) -> None:
    """Raises ValueError where balance is asked for, and there is nothing to balance."""
    loads_of(policy, config.balance)


def loads_of(policy: Policy, options: BalanceOptions) -> list[Load]:
    """The routers whose choices are counted. Raises ValueError where an option asks to balance nothing."""
    loads = []
    for part in PREFIX:
        of_part = routers(policy.trunk, part)
        if of_part:
            loads.append(Load(part, of_part, options))
    if not loads:
        for name, value in options:
            if value:
                raise ValueError(f"balance.{name}={value}, but this policy has no routed experts; set it to 0")
    return loads


class BalanceTerm(Term):
    """Experts are kept equally busy, and so are attention heads where these are dynamic.

    The bias moves in `end` alone, after the last update of the step: rollouts, old log-probabilities and every update
    of a step choose experts with the same one.
    """

    name = "balance"

    def __init__(self, loads: Sequence[Load], options: BalanceOptions) -> None:
        self.loads = loads
        self.trains = bool(options.entropy_weight or options.sequence_weight)

    def teaches(self, batch: TrainingBatch) -> bool:
        return self.trains

    def needs(self, row: PackedRow, work: Work) -> bool:
        return self.trains

    def before_update(self, work: Work) -> None:
        counts = work.fixed.get(self.name)
        if counts is None or counts[0].ended:
            work.fixed[self.name] = [load.begin_count(work.rows) for load in self.loads]

    @contextmanager
    def recording(self, policy: Policy) -> Iterator[list[RoutingRecorder]]:
        """Records what the routers choose in a forward of `policy`."""
        with ExitStack() as stack:
            yield [stack.enter_context(RoutingRecorder(policy.trunk, load.part)) for load in self.loads]

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor | None:
        """Count what the routers chose; the auxiliary losses, layers added up."""
        if not mini.counts:
            return None
        total = torch.zeros((), device=mini.mask.device)
        for load, count, routing in zip(self.loads, work.fixed[self.name], forward.records[self.name], strict=True):
            total = total + load.observe(routing, mini, count)
        return total

    def end(self, works: Sequence[Work]) -> Later:
        """Move the biases by what all ranks have counted in the step; the statistics of the step."""
        counts = [work.fixed[self.name] for work in works]
        each = []
        for load, of_load in zip(self.loads, zip(*counts, strict=True), strict=True):
            each.append(load.end(of_load, works[0].ranks))

        def of(tensors: Sequence[Tensor]) -> dict[str, float]:
            left, metrics = iter(tensors), dict[str, float]()
            for load in each:
                metrics |= load.of(list(islice(left, len(load.tensors))))
            return metrics

        return Later(list(chain.from_iterable(load.tensors for load in each)), of)

    @contextmanager
    def as_at_first(self) -> Iterator[None]:
        """Puts back, inside it, the biases that the routers had at step 0."""
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


@dataclass
class Count:
    """What the routers of one part of every layer have chosen for a batch."""

    tokens: int
    sequences: int
    chosen: Tensor  # [layers, experts]
    entropies: Tensor  # [layers]
    losses: list[tuple[str, Tensor]] = field(default_factory=list)  # the metric of each, and its value
    ended: bool = False  # whether its step has ended: a later one counts anew


class Load:
    """The routers of one part of every layer."""

    def __init__(self, part: Part, of_layers: Mapping[int, DeepseekV3TopkRouter], options: BalanceOptions) -> None:
        self.part, self.routers, self.options = part, of_layers, options
        first = next(iter(of_layers.values()))
        self.top_k, self.experts = first.top_k, first.num_experts
        for router in of_layers.values():  # bfloat16 would round a step of 0.001 away
            router.e_score_correction_bias.data = router.e_score_correction_bias.data.float()
        self.first_bias = [router.e_score_correction_bias.clone() for router in of_layers.values()]

    def begin_count(self, rows: Sequence[PackedRow]) -> Count:
        """Gives an empty count for a batch whose rows these are."""
        device = next(iter(self.routers.values())).weight.device
        return Count(
            sum(row.num_completion_tokens for row in rows),
            sum(len(row.samples) for row in rows),
            torch.zeros(len(self.routers), self.experts, dtype=torch.long, device=device),
            torch.zeros(len(self.routers), device=device),
        )

    def observe(self, routing: RoutingRecorder, mini: MicroBatch, count: Count) -> Tensor:
        total = torch.zeros((), device=mini.mask.device)
        biases = [router.e_score_correction_bias for router in self.routers.values()]
        completion_N, places_N = mini.cells // mini.mask.shape[1], mini.places[mini.numbers]
        for layer, (logits, experts) in enumerate(zip(routing.logits, routing.experts, strict=True)):
            logits_NE, chosen = logits[places_N], experts[places_N].flatten()
            count.chosen[layer].scatter_add_(0, chosen, torch.ones_like(chosen))
            count.entropies[layer] += entropy(gates(logits_NE.detach())).sum()
            if self.options.entropy_weight:
                loss = entropy_regulariser(logits_NE, biases[layer], self.top_k) * len(logits_NE) / count.tokens
                total = total + self._weighted("entropy", loss, count)
            if self.options.sequence_weight:
                each = sequence_loss(logits_NE, completion_N, len(mini.mask), self.top_k)
                total = total + self._weighted("sequence", each.sum() / count.sequences, count)
        return total

    def _weighted(self, name: str, loss: Tensor, count: Count) -> Tensor:
        kind = "" if self.part == "mlp" else "heads_"
        count.losses.append((f"loss/balance_{kind}{name}", loss.detach()))
        return getattr(self.options, f"{name}_weight") * loss

    @torch.no_grad()
    def end(self, counts: Sequence[Count], ranks: Ranks) -> Later:
        chosen, entropies = sum(count.chosen for count in counts), sum(count.entropies for count in counts)
        assert isinstance(chosen, Tensor)
        assert isinstance(entropies, Tensor)
        ranks.sum_tensors(chosen, entropies)
        if self.options.bias_rate:
            for router, chosen_E in zip(self.routers.values(), chosen, strict=True):
                bias = router.e_score_correction_bias
                bias.copy_(move_bias(bias, chosen_E, self.options.bias_rate))
        for count in counts:
            count.ended = True
        tokens = sum(count.tokens for count in counts)
        each = [len(count.losses) for count in counts]
        losses = list(chain.from_iterable(count.losses for count in counts))

        def of(tensors: Sequence[Tensor]) -> dict[str, float]:
            chosen, entropies, *values = tensors
            sums = ranks.sum_metrics(self._sums([name for name, _ in losses], values, each))
            read = chosen.sum(1) / self.top_k  # tokens, once for every update
            metrics = load_statistics(chosen, entropies / read, list(self.routers), PREFIX[self.part])
            updates = read[0].item() / tokens
            return metrics | {name: value / updates for name, value in sums.items()}

        return Later([chosen, entropies, *(value for _, value in losses)], of)

    def _sums(self, names: Sequence[str], values: Sequence[Tensor], each: Sequence[int]) -> Counter[str]:
        """The mean losses of the layers by name; those of each count, which has so many of `each`, are summed apart."""
        left, total = zip(names, values, strict=True), Counter[str]()
        for number in each:
            sums: Counter[str] = Counter()
            for name, value in islice(left, number):
                sums[name] += value.item() / len(self.routers)
            total += sums
        return total
