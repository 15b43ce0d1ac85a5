"""The policy losses of GRPO and its relatives.

Option names, meanings and defaults are those of TRL's GRPOConfig. The terms of the sum are in surrogates.py.

Shapes: B completions padded to T tokens; tensors are [B, T] unless said otherwise. `mask` is True on the
tokens that were sampled, the stop token included. It comes from lengths, never from token values, and nothing
off the mask matters, not even NaN.

A micro-batch returns its *summand*: denominators are counts of the whole step, so the losses, gradients and
metrics of micro-batches add up to those of the undivided batch (contract 10). A mean over each micro-batch
would instead weigh a token by which other tokens are in its micro-batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from grpo.algorithm import own
from grpo.algorithm.surrogates import (
    cispo_surrogate,
    clipped_surrogate,
    importance_correction,
    importance_ratio,
    kl_penalty,
    sapo_surrogate,
)
from grpo.config.loss import CorrectionMode, LossOptions, LossType

Given = TypeVar("Given")


MOST_WEIGHT = 3.0  # of the importance correction, as in TRL
MOST_OF_QUANTILE = 2**24  # values; `Tensor.quantile` takes no more
SAME_ENTROPY = 1e-5  # nats; equal contexts round differently where they are read with other rows
SAPO_TEMPERATURES = 1.0, 1.05  # of the gate for positive and for negative advantages, as in the paper


class Logprobs(NamedTuple):
    """The log-probability of each token under the four policies that meet here."""

    policy: Tensor  # log π of what is trained, with gradient
    old: Tensor | None = None  # log π_old, π before this step; None: π as it is now, detached
    sampling: Tensor | None = None  # log μ of what the engine sampled from
    reference: Tensor | None = None  # log π_ref, which anchors the KL penalty


class WholeStep(NamedTuple):
    """What is counted over a whole step; without it a micro-batch is one."""

    num_completion_tokens: int | None = None  # that are masked in
    num_sequences: int | None = None  # fully masked ones too
    max_completion_length: int | None = None  # the constant of dr_grpo
    top_entropy: TopEntropy | None = None  # None: of each micro-batch, as in TRL


def policy_loss(
    logprobs: Logprobs,
    advantages: Tensor,  # [B], or [B, T] from GAE
    mask: Tensor,
    options: LossOptions | None = None,  # None: the defaults
    *,
    entropy: Tensor | None = None,  # of π at every token, in nats
    correction: CorrectionMode | None = None,  # how objective terms are weighted by π_old / μ; None: not at all
    step: WholeStep | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = aggregate(-w·objective) + β·aggregate(KL) - entropy_coef·H. Returns (summand of L, metrics).

    `options.loss_type` chooses objective and denominators; w is π_old / μ by `correction`. Metrics are detached
    scalars and summands too: means per token of the step. Raises ValueError for a missing input.

    >>> policy, old = torch.tensor([[0.6, 0.5], [0.2, 0.9]]), torch.tensor([[0.4, 0.5], [0.4, 0.5]])
    >>> mask = torch.tensor([[True, True], [True, False]])        # ratios 1.5, 1, 0.5; clipped 1.2, 1, 0.8
    >>> loss, metrics = policy_loss(Logprobs(policy.log(), old.log()), torch.tensor([1.0, -1.0]), mask)
    >>> loss, metrics["policy/clip_fraction"]                     # -(1.2 + 1 - 0.8) / 3; two of three
    (tensor(-0.4667), tensor(0.6667))
    """
    options, step = options or LossOptions(), step or WholeStep()
    denominators = own.aggregate_of(options.loss_type)
    num_tokens = max(1, int(mask.sum()) if step.num_completion_tokens is None else step.num_completion_tokens)
    num_sequences = len(mask) if step.num_sequences is None else step.num_sequences

    def on_mask(x: Tensor) -> Tensor:
        return x.masked_fill(~mask, 0.0)

    def summand(per_token: Tensor) -> Tensor:
        return aggregate(per_token, mask, denominators, num_sequences, num_tokens, step.max_completion_length)

    policy_logprobs = on_mask(logprobs.policy)
    old_logprobs = policy_logprobs.detach() if logprobs.old is None else on_mask(logprobs.old)
    advantages = on_mask(advantages[:, None] if advantages.dim() == 1 else advantages)
    ratio = importance_ratio(policy_logprobs, old_logprobs, mask, options.importance_sampling_level)
    objective, watched = _objective(options, ratio, advantages, policy_logprobs)
    watched["policy/ratio_mean"] = ratio

    if logprobs.sampling is not None:
        log_ratio = old_logprobs - on_mask(logprobs.sampling)
        watched |= {"mismatch/logprob_abs_mean": log_ratio.abs(), "mismatch/kl": log_ratio.expm1() - log_ratio}
    if correction is not None:
        sampling_logprobs = _need(logprobs.sampling, "sampling_logprobs", correction)
        weight = importance_correction(old_logprobs, sampling_logprobs, mask, correction, MOST_WEIGHT)
        objective = objective * weight
        watched["mismatch/weight_mean"] = weight

    counted, num_counted, quantile = mask, num_tokens, options.top_entropy_quantile
    if quantile < 1:
        entropy = _need(entropy, "entropy", f"top_entropy_quantile={quantile}")
        threshold, num_counted = step.top_entropy or top_entropy_of(entropy[mask], quantile)
        counted = mask & (entropy >= threshold)
        objective = objective * counted
    loss = summand(-objective)
    metrics = {"loss/policy": loss.detach()}

    beta = options.beta
    if options.kl_estimator != "none" and (beta or logprobs.reference is not None):
        reference_logprobs = on_mask(_need(logprobs.reference, "reference_logprobs", f"{beta=}"))
        watched["loss/kl"] = kl_penalty(policy_logprobs, reference_logprobs, ratio, options.kl_estimator)
        loss = loss + beta * summand(watched["loss/kl"]) if beta else loss
    if entropy is not None:
        watched["policy/entropy"] = entropy
    if options.entropy_coef:
        entropy = _need(entropy, "entropy", f"entropy_coef={options.entropy_coef}")
        loss = loss - options.entropy_coef * entropy.masked_fill(~counted, 0.0).sum() / max(1, num_counted)
    return loss, metrics | {name: on_mask(x.detach()).sum() / num_tokens for name, x in watched.items()}


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    loss_type: LossType,
    num_sequences: int,
    num_completion_tokens: int,
    max_completion_length: int | None = None,
) -> Tensor:
    """This micro-batch's summand, a scalar. With N completions and M masked-in tokens in the whole step:

    grpo, sapo              1/N Σ_i 1/|o_i| Σ_t ℓ    every completion weighs the same
    dapo, cispo, reinforce  1/M Σ_i Σ_t ℓ            every token weighs the same
    dr_grpo                 1/(N·L) Σ_i Σ_t ℓ        L = max_completion_length: lengths do not matter
    bnpo                    B/N · local token mean   local by definition: the split into micro-batches matters

    >>> per_token = torch.tensor([[1.0, 2.0, 3.0], [8.0, 0.0, 0.0]])
    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> [aggregate(per_token, mask, kind, 2, 4, 10) for kind in ("grpo", "dapo", "dr_grpo", "bnpo")]
    [tensor(5.), tensor(3.5000), tensor(0.7000), tensor(3.5000)]
    """
    per_token, lengths_B = per_token.masked_fill(~mask, 0.0), mask.sum(-1)
    match loss_type:
        case "grpo" | "sapo":
            return (per_token.sum(-1) / lengths_B.clamp(min=1)).sum() / num_sequences
        case "dapo" | "cispo" | "reinforce":
            return per_token.sum() / num_completion_tokens
        case "dr_grpo":
            length = _need(max_completion_length, "max_completion_length", loss_type)
            return per_token.sum() / (num_sequences * length)
        case "bnpo":
            return per_token.sum() / lengths_B.sum().clamp(min=1) * (len(mask) / num_sequences)
    known = "'grpo', 'dr_grpo', 'dapo', 'bnpo', 'cispo', 'sapo' or 'reinforce'"
    raise ValueError(f"loss_type={loss_type!r} is unknown; use {known}")


class TopEntropy(NamedTuple):
    """The tokens that count are those whose entropy is at least `threshold`, a scalar. There are `tokens` of them."""

    threshold: Tensor
    tokens: int


def top_entropy_of(entropies_N: Tensor, top_entropy_quantile: float) -> TopEntropy:
    """The top ρ of these tokens by entropy, and all that equal the last of them up to rounding; without tokens an
    infinite threshold.

    Source: "Beyond the 80/20 rule", arXiv:2506.01939, which takes ρ = 0.2.

    >>> top_entropy_of(torch.tensor([0.1, 0.5, 0.3]), top_entropy_quantile=0.5)
    TopEntropy(threshold=tensor(0.3000), tokens=2)
    """
    if not len(entropies_N):
        return TopEntropy(entropies_N.new_tensor(torch.inf), 0)
    entropies_N = entropies_N.detach()
    if len(entropies_N) <= MOST_OF_QUANTILE:
        threshold = entropies_N.quantile(1 - top_entropy_quantile)
    else:
        below = math.ceil((1 - top_entropy_quantile) * (len(entropies_N) - 1))
        threshold = entropies_N.kthvalue(below + 1).values
    threshold = threshold - SAME_ENTROPY
    return TopEntropy(threshold, int((entropies_N >= threshold).sum()))


def _objective(
    options: LossOptions, ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of each token, and which tokens a clip holds back, by metric."""
    epsilon, epsilon_high = options.epsilon, options.epsilon_high
    if own.is_own(options.loss_type):
        return own.objective_of(options.loss_type)(ratio, advantages, policy_logprobs, options), {}
    match options.loss_type:
        case "reinforce":
            return advantages * policy_logprobs, {}
        case "sapo":
            temperatures = SAPO_TEMPERATURES
            return sapo_surrogate(ratio, advantages, *temperatures), {}
        case "cispo":
            cap = _need(epsilon_high, "epsilon_high, the cap of the ratio (ScaleRL: 5.0)", options.loss_type)
            clipped = {"policy/clip_fraction": ratio > cap}
            return cispo_surrogate(ratio, advantages, policy_logprobs, cap), clipped
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    low, high = (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
    clipped = {"policy/clip_fraction": low | high, "policy/clip_fraction_low": low, "policy/clip_fraction_high": high}
    return clipped_surrogate(ratio, advantages, epsilon, epsilon_high, options.delta), clipped


def _need(value: Given | None, name: str, reason: str) -> Given:
    if value is None:
        raise ValueError(f"{reason} needs {name}")
    return value
