"""Verification of drafts: as noise is keyed by position, a draft is right exactly where the trunk chooses the same."""

from __future__ import annotations

import torch
from torch import Tensor

from rollout.sampling import by_temperature


def verify_draft(targets_RS: Tensor, drafts_RK: Tensor) -> Tensor:
    """Counts how many drafts of each row the trunk accepts [R]: the leading ones that equal its own choice.

    `targets_RS` (S = K + 1) are the trunk's choices in place of each of the K drafts and after the last one. The token
    after the last accepted draft is therefore always the trunk's own (the bonus token).

    >>> verify_draft(torch.tensor([[5, 6, 7], [5, 9, 7]]), torch.tensor([[5, 6], [4, 9]]))
    tensor([2, 0])
    """
    agree = (targets_RS[:, : drafts_RK.shape[1]] == drafts_RK).to(torch.int64)
    return agree.cumprod(dim=1).sum(dim=1)


def until_end(
    targets_RS: Tensor, accepted_R: Tensor | None, alive_R: Tensor, left_R: Tensor | int, stops: Tensor
) -> tuple[Tensor, Tensor]:
    """Says how many of its tokens each row keeps [R], and which rows stop [R], at the first of the `stops` it keeps.

    `accepted_R` are None without drafts, where a live row keeps its one token; `left_R` is how many tokens a row may
    still get.

    >>> until_end(torch.tensor([[5, 6, 2]]), torch.tensor([2]), torch.tensor([True]), 9, torch.tensor([6]))
    (tensor([2]), tensor([True]))
    """
    if accepted_R is None:
        return alive_R.long(), (targets_RS == stops).any(1) & alive_R
    steps = torch.arange(targets_RS.shape[1], device=targets_RS.device)
    lengths = torch.minimum(accepted_R + 1, torch.as_tensor(left_R, device=accepted_R.device)) * alive_R
    is_stop = (targets_RS[..., None] == stops).any(-1) & (steps < lengths[:, None])
    stopped = is_stop.any(1)
    return torch.where(stopped, is_stop.long().argmax(1) + 1, lengths), stopped


def confident_drafts(logits_NV: Tensor, temperature: float | Tensor, margin: float) -> Tensor:
    """Finds the drafts that `accept: margin` takes [N]: log p(best) − log p(second) > `margin` nats at the temperature.

    >>> confident_drafts(torch.tensor([[5.0, 1.0, 0.0], [1.0, 0.5, 0.0]]), temperature=1.0, margin=2.0)
    tensor([ True, False])
    """
    if isinstance(temperature, Tensor):
        return by_temperature(temperature, lambda t, rows: (confident_drafts(logits_NV[rows], t, margin),))[0]
    best, second = logits_NV.float().topk(2, dim=-1).values.unbind(-1)
    return (best - second) / (temperature or 1.0) > margin
