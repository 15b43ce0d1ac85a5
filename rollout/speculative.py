"""Verification of drafts: with noise that is keyed by position, a draft is right exactly when the trunk agrees."""

from __future__ import annotations

import torch
from torch import Tensor


def verify_draft(targets_RS: Tensor, drafts_RK: Tensor) -> Tensor:
    """How many drafts of each row the trunk accepts: the leading ones that equal its own choice. [R]

    `targets_RS` (S = K + 1) are the trunk's choices in place of each of the K drafts and behind the last one; the token
    after the last accepted draft is therefore always the trunk's own (the bonus token).

    >>> verify_draft(torch.tensor([[5, 6, 7], [5, 9, 7]]), torch.tensor([[5, 6], [4, 9]]))
    tensor([2, 0])
    """
    agree = (targets_RS[:, : drafts_RK.shape[1]] == drafts_RK).to(torch.int64)
    return agree.cumprod(dim=1).sum(dim=1)
