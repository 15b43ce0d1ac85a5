"""Log-probabilities of completions under the policy that learns, at the temperature that they were sampled at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo.learner.batch import MicroBatch, collate
from grpo.learner.row import PackedRow, Sample
from policies.devices import fetch
from policies.logprobs import logprobs_from_hidden
from policies.lora import adapter_off
from policies.policy import Policy
from policies.routing.replay import RoutingReplay
from rollout.group import RolloutGroup

GROUPS_READ = 8  # once more after a step, one completion each, to see how far it has moved the policy


@dataclass(frozen=True)
class Forward:
    """What one forward of a micro-batch gives: log-probabilities [C, L] and the states the MTP head learns from."""

    logprobs: Tensor
    entropy: Tensor  # differentiable where the loss has `entropy_coef`
    preceding: Tensor  # [B, T, D] the hidden state that predicts each token
    records: dict[str, Any] = field(default_factory=dict)  # what watchers have recorded, by their names


class Watcher(Protocol):
    """What is entered around forwards; see `Term`."""

    name: str

    def recording(self, policy: Policy) -> AbstractContextManager[Any]: ...

    def as_at_first(self) -> AbstractContextManager[None]: ...


class Likelihood:
    """The forward passes of a learner: of the policy, and of the reference that a KL penalty is measured to."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None = None,
        temperature: float = 1.0,
        *,
        entropy_grad: bool = False,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """`reference` is a frozen copy; None with adapters, whose base is the reference."""
        self.policy, self.reference, self.watchers = policy, reference, watchers
        self.temperature, self.entropy_grad = temperature, entropy_grad

    def forward(self, mini: MicroBatch, policy: Policy | None = None, temperature: float | None = None) -> Forward:
        """Reads a micro-batch, at the temperature of the rollouts or at this one."""
        policy, learning = policy or self.policy, torch.is_grad_enabled()
        with torch.set_grad_enabled(learning and mini.learns):
            with ExitStack() as stack:
                watchers = self.watchers if learning else ()
                records = {watcher.name: stack.enter_context(watcher.recording(policy)) for watcher in watchers}
                preceding = self.preceding(mini, policy)
            logprobs, entropy = logprobs_from_hidden(
                mini.of_scored(preceding),
                policy.output,
                mini.of_scored(mini.token_ids),
                self.temperature if temperature is None else temperature,
                entropy_grad=self.entropy_grad,
            )
        return Forward(mini.by_completion(logprobs), mini.by_completion(entropy), preceding, records)

    def preceding(self, mini: MicroBatch, policy: Policy | None = None) -> Tensor:
        """Gives the hidden state that predicts each token [B, T, D]."""
        policy = policy or self.policy
        hidden = policy.hidden(*mini.laid)
        return hidden.gather(1, mini.before[..., None].expand_as(hidden))

    @torch.no_grad()
    def of_reference(self, mini: MicroBatch) -> Tensor:
        """Scores by the reference [C, L]: adapters off, or the frozen copy. Both equal the policy at step 0."""
        if self.reference is not None:
            return self.forward(mini, self.reference).logprobs
        with ExitStack() as stack:
            stack.enter_context(adapter_off(self.policy.trunk))
            for watcher in self.watchers:
                stack.enter_context(watcher.as_at_first())
            return self.forward(mini).logprobs

    def replaying(self, mini: MicroBatch) -> RoutingReplay:
        """Policy and reference alike, so that the KL between them starts at zero."""
        policies = [self.policy] if self.reference is None else [self.policy, self.reference]
        return RoutingReplay([policy.trunk for policy in policies], mini.routing)

    @torch.no_grad()
    def again(self, minis: Sequence[MicroBatch], temperature: float | None = None) -> list[Tensor]:
        """Log-probabilities [1, L] of the only sample of each micro-batch, see `probes`. Every rank that shares the
        policy must ask for the same samples."""
        read = []
        for mini in minis:
            with self.replaying(mini):
                read.append(self.forward(mini, temperature=temperature).logprobs)
        return read

    def moved(
        self,
        rows: Sequence[PackedRow],
        before: Mapping[tuple[int, int], Sequence[float]],
        temperature: float | None = None,
    ) -> float:
        """How far the policy is from what it was `before`, by the `probes` of these rows, see `approx_kl`."""
        minis = [collate([row], self.policy.device) for row in probes(rows)]
        now = fetch(self.again(minis, temperature))
        return approx_kl([mini.samples[0] for mini in minis], before, now)


def probes(rows: Sequence[PackedRow]) -> list[PackedRow]:
    """One completion from each of the first GROUPS_READ groups that teach something, since completions of one group
    differ much less than groups do; its advantage is not zero. Where no group teaches, they are of the first groups."""
    chosen: dict[int, PackedRow] = {}
    for row in [row for row in rows if not row.tied] or rows:
        sample = next((sample for sample in row.samples if not sample.tied), row.samples[0])
        chosen.setdefault(row.group, replace(row, samples=[sample]))
    return list(chosen.values())[:GROUPS_READ]


def approx_kl(
    samples: Sequence[Sample], before: Mapping[tuple[int, int], Sequence[float]], now: Sequence[Tensor]
) -> float:
    """KL(before ‖ now) of the policy in nats per token: the mean of r - 1 - log r over tokens that it sampled, with r
    the ratio of their probabilities now and before (Schulman's k3). `now` has log-probabilities [1, L] of each sample
    in the host's memory, `before` those of all by `Sample.index` and `start`."""
    total, tokens = 0.0, 0
    for sample, logprobs in zip(samples, now, strict=True):
        was = torch.tensor(before[sample.index, sample.start])
        sampled = torch.tensor(sample.sampled or [True] * len(was))
        log_ratio = (logprobs[0] - was)[sampled]
        total += (log_ratio.expm1() - log_ratio).sum().item()
        tokens += sample.num_sampled
    return total / tokens


@torch.no_grad()
def logprobs_of_groups(policy: Policy, groups: Sequence[RolloutGroup], temperature: float) -> list[list[list[float]]]:
    """The policy scores every token, by group and completion, with the experts and attention heads that the groups have
    recorded, if any. Every rank that shares the policy must ask for the same groups."""
    rows = []
    for group in groups:
        samples = [Sample(i, c.token_ids, routing=c.routing) for i, c in enumerate(group.completions)]
        rows.append(PackedRow(group.prompt.token_ids, samples, group.prompt_routing))
    mini, likelihood = collate(rows, policy.device), Likelihood(policy, temperature=temperature)
    with likelihood.replaying(mini):
        values = iter(likelihood.forward(mini).logprobs.tolist())
    scored = []
    for group in groups:
        scored.append([next(values)[: len(c.token_ids)] for c in group.completions])
    return scored
