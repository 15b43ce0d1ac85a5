"""How likely the gold solutions are under a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo.learner.batch import micro_batches
from grpo.learner.likelihood import Likelihood
from grpo.learner.row import PackedRow
from policies.devices import wide
from policies.logprobs import logprobs_from_hidden
from policies.policy import Policy

TOKENS_PER_FORWARD = 4096  # padded; bounds memory, changes nothing


@dataclass(frozen=True)
class Perplexity:
    """exp(−mean log π) over all solution tokens, the stop token included, at temperature 1.

    `too_long` solutions do not fit into the policy's context with their prompts, and are left out.
    """

    nats_per_token: float
    tokens: int
    solutions: int
    too_long: int = 0

    @property
    def value(self) -> float:
        return math.exp(self.nats_per_token)


@torch.no_grad()
def gold_perplexity(policy: Policy, rows: Sequence[PackedRow]) -> Perplexity | None:
    """Perplexity of the completions in `rows` given their prompts; None without any token to score.

    >>> gold_perplexity(policy, [PackedRow([7, 8], [Sample(0, [1, 2, 0])])]).tokens
    3
    """
    fitting = [row for row in rows if row.length <= policy.max_length]
    nats, tokens = 0.0, 0
    for mini in micro_batches(fitting, TOKENS_PER_FORWARD, policy.device):
        preceding = Likelihood(policy).preceding(mini)
        logprobs, _ = logprobs_from_hidden(mini.of_scored(preceding), policy.output, mini.of_scored(mini.token_ids))
        nats -= wide(logprobs).sum().item()
        tokens += len(logprobs)
    if not tokens:
        return None
    return Perplexity(nats / tokens, tokens, sum(len(row.samples) for row in fitting), len(rows) - len(fitting))
