"""The terms of a policy loss, token by token: importance ratio, surrogate objective, KL penalty, correction.

Shapes and symbols are those of losses.py: tensors are [B, T] unless said otherwise, π is trained, π_old is π
before this step, μ is what the engine sampled from, π_ref is the reference, Â an advantage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.loss import CorrectionMode, KLEstimator, Level


def importance_ratio(policy_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """r = π / π_old of each token, [B, T]; "sequence": its geometric mean over the completion, [B, 1].

    Source: GRPO, arXiv:2402.03300, eq. 3; GSPO, arXiv:2507.18071, eq. 7: s = (π(y) / π_old(y))^(1/|y|).

    >>> policy, old, mask = torch.tensor([[0.5, 0.2]]), torch.tensor([[0.25, 0.4]]), torch.ones(1, 2) > 0
    >>> importance_ratio(policy.log(), old.log(), mask)
    tensor([[2.0000, 0.5000]])
    >>> importance_ratio(policy.log(), old.log(), mask, "sequence").round(decimals=4)      # √(2 · 0.5)
    tensor([[1.]])
    """
    log_ratio = (policy_logprobs - old_logprobs).masked_fill(~mask, 0.0)
    match level:
        case "token":
            return log_ratio.exp()
        case "sequence":
            return (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
    raise ValueError(f"importance_sampling_level={level!r} is unknown; use 'token' or 'sequence'")


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon: float = 0.2, epsilon_high: float = 0.2, delta: float | None = None
) -> Tensor:
    """min(r·Â, clip(r, 1 - ε, 1 + ε_high)·Â), to be maximised.

    Source: PPO, arXiv:1707.06347, eq. 7; a higher ε_high: DAPO, arXiv:2503.14476, §3.1. The minimum leaves
    r·Â unbounded where Â < 0; `delta` caps that r too (two-sided clipping, INTELLECT-2, arXiv:2505.07291).

    >>> clipped_surrogate(torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    tensor([ 1.2000, -1.5000,  0.5000, -0.8000])
    """
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return torch.minimum(capped * advantages, clipped * advantages)


def cispo_surrogate(ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor, epsilon_high: float) -> Tensor:
    """sg[min(r, ε_high)]·Â·log π, to be maximised; sg stops the gradient, so clipping silences no token.

    Source: CISPO, MiniMax-M1, arXiv:2506.13585, eq. 4-5. ε_high is the cap itself, not 1 + ε (ScaleRL,
    arXiv:2510.13786, uses 5.0).

    >>> cispo_surrogate(torch.tensor([9.0]), torch.tensor([2.0]), torch.tensor([-0.1]), epsilon_high=5.0)
    tensor([-1.])
    """
    return ratio.clamp(max=epsilon_high).detach() * advantages * policy_logprobs


def sapo_surrogate(
    ratio: Tensor, advantages: Tensor, temperature_pos: float = 1.0, temperature_neg: float = 1.05
) -> Tensor:
    """4/τ·sigmoid(τ(r - 1))·Â, to be maximised: a soft gate, with τ_pos where Â > 0 and τ_neg elsewhere.

    Source: SAPO, arXiv:2511.20347. The slope in r is Â at r = 1 and fades on both sides.

    >>> sapo_surrogate(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]))          # sigmoid(1) = 0.7311
    tensor([1.0000, 1.4621])
    """
    temperature = torch.where(advantages > 0, temperature_pos, temperature_neg)
    return 4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages


def kl_penalty(policy_logprobs: Tensor, reference_logprobs: Tensor, ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """An estimate of KL(π ‖ π_ref) from each token. With d = log π_ref - log π:

    k1 = -d, k2 = d²/2, k3 = e^d - d - 1 (Schulman, "Approximating KL divergence", 2020; k3 is GRPO's,
    arXiv:2402.03300, eq. 4), unbiased = r·k3 (DeepSeek-V3.2, arXiv:2512.02556, eq. 7; TRL's default).
    Gradients are another matter. On-policy, those of k2 and r·k3 are on average that of KL(π ‖ π_ref), that
    of k3 is that of KL(π_ref ‖ π), and that of k1 is zero: k1 is there to be watched, not to train with.

    >>> policy, reference, ratio = torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([2.0])
    >>> [kl_penalty(policy, reference, ratio, k) for k in ("k1", "k2", "k3", "unbiased")]  # d = -log 2
    [tensor([0.6931]), tensor([0.2402]), tensor([0.1931]), tensor([0.3863])]
    """
    d = reference_logprobs - policy_logprobs
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d.square() / 2
        case "k3":
            return d.expm1() - d
        case "unbiased":
            return ratio * (d.expm1() - d)
    raise ValueError(f"kl_estimator={estimator!r} is unknown; use 'none', 'k1', 'k2', 'k3' or 'unbiased'")


@torch.no_grad()
def importance_correction(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    mode: CorrectionMode,
    clip_max: float = 3.0,
) -> Tensor:
    """Weights π_old / μ, without gradient, for tokens sampled in another precision or by older weights.

    "token_…" gives each token its ratio, [B, T]; "sequence_…" the completion their product, [B, 1].
    "…_truncate" takes at most `clip_max` (TIS, Yao et al. 2025); "…_mask" puts 0 above it (MIS, Liu et al. 2025).

    >>> old, sampling, mask = torch.tensor([[0.6, 0.3]]), torch.tensor([[0.2, 0.2]]), torch.ones(1, 2) > 0
    >>> importance_correction(old.log(), sampling.log(), mask, "token_truncate", clip_max=2.0)  # 3 and 1.5
    tensor([[2.0000, 1.5000]])
    >>> importance_correction(old.log(), sampling.log(), mask, "token_mask", clip_max=2.0)
    tensor([[0.0000, 1.5000]])
    >>> importance_correction(old.log(), sampling.log(), mask, "sequence_truncate", clip_max=4.0)
    tensor([[4.]])
    """
    level, _, bound = mode.partition("_")
    if level not in ("token", "sequence") or bound not in ("truncate", "mask"):
        modes = "'token_truncate', 'token_mask', 'sequence_truncate' or 'sequence_mask'"
        raise ValueError(f"importance_sampling_mode={mode!r} is unknown; use {modes}")
    log_ratio = (old_logprobs - sampling_logprobs).masked_fill(~mask, 0.0)
    ratio = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    clamped = ratio.clamp(max=clip_max)
    return clamped if bound == "truncate" else ratio.masked_fill(ratio != clamped, 0.0)
