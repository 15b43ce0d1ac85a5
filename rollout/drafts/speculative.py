"""Verification of drafts: as noise is keyed by position, a draft is right exactly where the trunk chooses the same."""

from __future__ import annotations

import torch
from torch import Tensor

from rollout.sampling import by_temperature


def verify_draft(targets_RS: Tensor, drafts_RK: Tensor) -> Tensor:
    """How many drafts of each row the trunk accepts [R]: the leading ones that equal its own choice.

    `targets_RS` (S = K + 1) are the trunk's choices in place of each of the K drafts and after the last one. The token
    after the last accepted draft is therefore always the trunk's own (the bonus token).

    >>> verify_draft(torch.tensor([[5, 6, 7], [5, 9, 7]]), torch.tensor([[5, 6], [4, 9]]))
    tensor([2, 0])
    """
    agree = (targets_RS[:, : drafts_RK.shape[1]] == drafts_RK).to(torch.int64)
    return agree.cumprod(dim=1).sum(dim=1)


def confident_drafts(logits_NV: Tensor, temperature: float | Tensor, margin: float) -> Tensor:
    """Which drafts `accept: margin` takes [N]: log p(best) − log p(second best) > `margin` nats at the temperature.

    >>> confident_drafts(torch.tensor([[5.0, 1.0, 0.0], [1.0, 0.5, 0.0]]), temperature=1.0, margin=2.0)
    tensor([ True, False])
    """
    if isinstance(temperature, Tensor):
        return by_temperature(temperature, lambda t, rows: (confident_drafts(logits_NV[rows], t, margin),))[0]
    best, second = logits_NV.float().topk(2, dim=-1).values.unbind(-1)
    return (best - second) / (temperature or 1.0) > margin
