"""Losses of single tokens against the policy that sampled them, by the names and formulas of Tinker's API.

Source of the names, formulas and defaults: https://tinker-docs.thinkingmachines.ai/tinker/losses.
Each function takes log p of the policy that learns, log q of the policy that sampled, the advantages A, and a mask that
is true at sampled tokens. All are tensors [..., L], log-probabilities in nats; the last axis holds the L tokens of one
sequence. Each returns the loss of every token, [..., L]. A session takes the mean over the tokens of the step
(`Term.scalar`), and Tinker's server takes the sum.

`session.forward_backward(batch, loss)` takes a name, except cispo, which is a loss_type there; a function as it is; or
a `TokenLoss` with other settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def cross_entropy(logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-w log p, with the advantages as the weights w. It does not read q.

    A batch of solutions has no advantages: use the loss "supervised" for it.

    >>> p, q, weights = torch.tensor([-2.0, -3.0]), torch.zeros(2), torch.tensor([0.5, 1.0])
    >>> cross_entropy(p, q, weights, torch.ones(2))                                             # 0.5 · 2 and 1 · 3
    tensor([1., 3.])
    """
    return -advantages * logprobs


def importance_sampling(logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-r A with the ratio r = p / q.

    >>> p, q, advantages = torch.tensor([0.75]).log(), torch.tensor([0.5]).log(), torch.tensor([2.0])
    >>> importance_sampling(p, q, advantages, torch.ones(1))                                    # r = 1.5
    tensor([-3.])
    """
    return -(logprobs - sampling_logprobs).exp() * advantages


def ppo(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Tensor:
    """-min(r A, clip(r) A) with r = p / q (Schulman et al., 2017, arXiv 1707.06347, equation 7). The thresholds are the
    bounds of the ratio itself.

    >>> p, q, advantages = torch.tensor([0.75]).log(), torch.tensor([0.5]).log(), torch.tensor([2.0])
    >>> ppo(p, q, advantages, torch.ones(1))                                                    # r = 1.5 is clipped
    tensor([-2.4000])
    """
    ratio = (logprobs - sampling_logprobs).exp()
    clipped = ratio.clamp(clip_low_threshold, clip_high_threshold)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def cispo(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Tensor:
    """-clip(r) A log p. The clipped ratio is a weight and has no gradient (MiniMax, 2025, arXiv 2506.13585).

    >>> p, q, advantages = torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([2.0])
    >>> cispo(p, q, advantages, torch.ones(1))                                                  # r = 1
    tensor([2.])
    """
    ratio = (logprobs.detach() - sampling_logprobs).exp()
    return -ratio.clamp(clip_low_threshold, clip_high_threshold) * advantages * logprobs


def dro(logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor, beta: float = 0.05) -> Tensor:
    """-(A log p - β/2 log² r) with r = p / q: a quadratic penalty on the log-ratio (arXiv 2405.19107).

    >>> p, q, advantages = torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([0.5])
    >>> dro(p, q, advantages, torch.ones(1))                                                    # 0.5 + 0.025 · 2²
    tensor([0.6000])
    """
    penalty = 0.5 * beta * (logprobs - sampling_logprobs).square()
    return -(advantages * logprobs - penalty)


def gspo(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> Tensor:
    """PPO's loss with one ratio for a sequence: the geometric mean of r = p / q over the tokens of the mask. Each token
    has this ratio as its value, and its own gradient (GSPO-token: Zheng et al., 2025, arXiv 2507.18071).

    A segment of an episode is a sequence of its own. Without any token in the mask, the ratio is 1.

    >>> p, q, advantages = torch.tensor([0.75, 0.5]).log(), torch.tensor([0.75, 0.5]).log(), torch.tensor([3.0, -2.0])
    >>> gspo(p, q, advantages, torch.ones(2))                                                   # r = 1
    tensor([-3.,  2.])
    """
    counts = mask != 0
    differences = (logprobs.detach() - sampling_logprobs).masked_fill(~counts, 0.0)
    log_ratio = differences.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
    ratio = (log_ratio + logprobs - logprobs.detach()).exp()
    clipped = ratio.clamp(clip_low_threshold, clip_high_threshold)
    return -torch.minimum(ratio * advantages, clipped * advantages)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}


@dataclass(frozen=True)
class TokenLoss:
    """A loss of LOSSES with settings; what is None has the default of its function. Two of them are equal if they
    compute the same.

    Raises ValueError for an unknown name, a setting that the loss does not read, and a value that is not a finite
    number.

    >>> TokenLoss("dro", beta=0.1).settings
    {'beta': 0.1}
    >>> TokenLoss("ppo") == TokenLoss("ppo", clip_low_threshold=0.8)
    True
    """

    name: str
    clip_low_threshold: float | None = None
    clip_high_threshold: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        defaults = settings_of(self.name)
        for key, value in vars(self).items():
            if key == "name":
                continue
            if value is None:
                object.__setattr__(self, key, defaults.get(key))
            elif why := fault_of(self.name, key, value):
                raise ValueError(f"{key}={value!r}: {why}")

    @property
    def settings(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in settings_of(self.name)}

    def __call__(self, logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return LOSSES[self.name](logprobs, sampling_logprobs, advantages, mask, **self.settings)


def settings_of(name: str) -> dict[str, float]:
    """The settings of a loss with their defaults. Raises ValueError for an unknown name.

    >>> settings_of("dro")
    {'beta': 0.05}
    """
    if name not in LOSSES:
        raise ValueError(f"loss {name!r}: there is none of this name; use {', '.join(LOSSES)}")
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def fault_of(name: str, key: str, value: object) -> str:
    """Why a loss does not take this setting, in words; empty if it does.

    >>> fault_of("dro", "beta", 1), fault_of("dro", "beta", float("nan"))
    ('', 'use a finite number of float32')
    """
    known = settings_of(name)
    if key not in known or not isinstance(value, int | float):
        return f"{name} takes numbers for {', '.join(known) or 'nothing'}"
    return "" if abs(value) <= torch.finfo(torch.float32).max else "use a finite number of float32"
