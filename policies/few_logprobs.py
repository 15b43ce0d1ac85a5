"""Log-probabilities of few tokens at every position, by which a student is compared with its teacher.

Shapes: N scored tokens, K tokens of each position, vocabulary V, width D. All is computed in fp32 or above.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policies.lm_head import LMHead
from policies.logprobs import CHUNK, scaled


def logprobs_at(
    hidden: Tensor, lm_head: Tensor | LMHead, token_ids: Tensor, temperature: float = 1.0, *, chunk: int = CHUNK
) -> Tensor:
    """Log-probabilities of K tokens at every position: [N, D], [V, D], [N, K] -> [N, K].

    `chunk` rows of logits are held at a time, and made again in the backward pass. Differentiable in `hidden` and
    the LM head.

    >>> hidden, lm_head = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0986123]])
    >>> logprobs_at(hidden, lm_head, torch.tensor([[0, 1], [1, 0]])).exp()
    tensor([[0.5000, 0.5000],
            [0.7500, 0.2500]])
    """

    head = LMHead(lm_head) if isinstance(lm_head, Tensor) else lm_head

    def of_rows(rows: Tensor, ids: Tensor) -> Tensor:
        logits = scaled(head.logits(rows), temperature)
        return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

    parts = zip(hidden.split(chunk), token_ids.split(chunk), strict=True)
    return torch.cat([checkpoint(of_rows, rows, ids, use_reentrant=False) for rows, ids in parts])


@torch.no_grad()
def top_logprobs(
    hidden: Tensor, lm_head: Tensor | LMHead, k: int, temperature: float = 1.0, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of every position and their log-probabilities, without gradients: [N, D], [V, D] ->
    [N, k] of both. A k above V is V.

    >>> top_logprobs(torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0986123]]), k=1)     # 3/4: -0.2877
    (tensor([[1]]), tensor([[-0.2877]]))
    """
    head = LMHead(lm_head) if isinstance(lm_head, Tensor) else lm_head
    ids, logprobs = [], []
    for rows in hidden.split(chunk):
        logits = scaled(head.logits(rows), temperature)
        top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        ids.append(top.indices)
        logprobs.append(top.values - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)
