"""Log-probabilities and entropies of tokens. Logits and tokens are shifted by one only here.

Everything is computed in fp32 (fp64 stays fp64) and under the temperature-scaled distribution, because the tokens were
sampled from that one (contract 2).

Shapes: B rows of T tokens, N scored tokens, vocabulary V, width D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policies.lm_head import LMHead

CHUNK = 256  # rows of logits held in fp32 at a time: 256 · 49,152 · 4 bytes = 50 MB
GRADIENT_CHUNKS = 4  # whose gradients become one product with the hidden states: the sum is as large as the LM head
LEAST_LOGPROB = -1000.0  # a token of less has the probability 0, in fp64 too, and 0 · -1000 is 0 where 0 · -∞ is NaN
CHUNK_ELEMENTS = 1 << 22  # logits that the learner holds at a time: 16 MB in fp32, whatever the vocabulary


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token_ids] of aligned logits and tokens: [..., V], [...] -> [...].

    Raises ValueError if they are not aligned or the temperature is not positive.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0986123]])       # log 3 = 1.0986
    >>> token_logprobs(logits, torch.tensor([0, 1])).exp()          # 1/2 and 3/4
    tensor([0.5000, 0.7500])
    """
    if logits.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"logits {list(logits.shape)} and token_ids {list(token_ids.shape)} are not aligned: every token "
            "needs the logits that predicted it; shifted_logprobs() takes whole rows and shifts them"
        )
    logprobs = []
    rows = logits.reshape(-1, logits.shape[-1]).split(CHUNK)
    for rows_NV, ids_N in zip(rows, token_ids.reshape(-1).split(CHUNK), strict=True):
        x = scaled(rows_NV, temperature)
        logprobs.append(x.gather(-1, ids_N[:, None])[:, 0] - x.logsumexp(-1))
    return torch.cat(logprobs).view(token_ids.shape)


def shifted_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of tokens 1 … T-1 of whole rows: [B, T, V], [B, T] -> [B, T-1].

    A row [a, b, c] gives [log p(b | a), log p(c | a b)], since logits[:, t] predict token_ids[:, t + 1].

    >>> shifted_logprobs(torch.zeros(1, 3, 4), torch.tensor([[3, 0, 1]])).exp()
    tensor([[0.2500, 0.2500]])
    """
    return token_logprobs(logits[:, :-1], token_ids[:, 1:], temperature)


def logprobs_from_hidden(
    hidden: Tensor,
    lm_head: Tensor | LMHead,
    token_ids: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int = CHUNK,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies without all logits in memory at once: [N, D], [V, D], [N] -> [N], [N].

    `chunk` rows of logits are made at a time, and again in the backward pass, so memory grows with chunk · V and not
    with N · V. Differentiable in `hidden` and in the LM head, the entropy only with `entropy_grad=True`.

    >>> hidden, lm_head = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0986123]])
    >>> logprobs, entropies = logprobs_from_hidden(hidden, lm_head, torch.tensor([0, 1]))
    >>> logprobs.exp(), entropies                                   # log 2 and 2 log 2 - 3/4 log 3
    (tensor([0.5000, 0.7500]), tensor([0.6931, 0.5623]))
    """
    head = LMHead(lm_head) if isinstance(lm_head, Tensor) else lm_head
    bias = head.bias
    if head.scale != 1.0:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    how = _How(head.cap, temperature, chunk, entropy_grad)
    return _Scored.apply(hidden, head.weight, bias, token_ids, how)


@dataclass(frozen=True)
class _How:
    cap: float | None
    temperature: float
    chunk: int
    entropy_grad: bool


class _Scored(torch.autograd.Function):
    """Scores chunk by chunk. With log p = x - log Z: ∂ log p_i / ∂x_j = 1[i = j] - p_j and ∂H / ∂x_j = -p_j (log p_j +
    H). Of a capped logit y = c tanh(z / c) the slope is ∂y / ∂z = 1 - (y / c)²."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        head = LMHead(weight, bias, cap=how.cap)
        logprobs, totals, entropies = [], [], []
        for rows, ids in zip(hidden.split(how.chunk), token_ids.split(how.chunk), strict=True):
            logits = scaled(head.logits(rows), how.temperature)
            totals.append(logits.logsumexp(-1))
            log_p = logits.sub_(totals[-1][:, None])
            logprobs.append(log_p.gather(-1, ids[:, None])[:, 0])
            entropies.append(-log_p.exp().mul_(log_p.clamp_(min=LEAST_LOGPROB)).sum(-1))
        entropy_N = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, token_ids, torch.cat(totals), entropy_N)
        ctx.how = how
        ctx.set_materialize_grads(False)
        if not how.entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, totals, entropies = ctx.saved_tensors
        how: _How = ctx.how
        head = LMHead(weight, bias, cap=how.cap)
        zero = torch.zeros_like(totals)
        of_logprob, of_entropy = (zero if gradient is None else gradient for gradient in gradients)
        grad_hidden, grad_weight, grad_bias = torch.empty_like(hidden), None, None
        if ctx.needs_input_grad[1]:
            # Summed in fp32, since bf16 would lose a little of the sum with every chunk.
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias)
        for first in range(0, len(hidden), GRADIENT_CHUNKS * how.chunk):
            together = slice(first, first + GRADIENT_CHUNKS * how.chunk)
            of_logits = hidden.new_empty(len(hidden[together]), len(weight))
            for part, start in zip(of_logits.split(how.chunk), range(first, len(hidden), how.chunk), strict=False):
                at = slice(start, start + len(part))
                logits = head.logits(hidden[at])
                slope = None if how.cap is None else 1 - (logits / how.cap) ** 2
                x = scaled(logits, how.temperature).sub_(totals[at, None])
                upstream = of_logprob[at, None]
                if gradients[1] is None:
                    x = x.exp_().mul_(-upstream)
                else:
                    p = x.exp()
                    x.clamp_(min=LEAST_LOGPROB).add_(entropies[at, None]).mul_(of_entropy[at, None]).add_(upstream)
                    x = p.mul_(x).neg_()
                x = x.scatter_add_(1, token_ids[at, None], upstream).div_(how.temperature)
                part.copy_(x if slope is None else x * slope)
            grad_hidden[together] = of_logits @ weight
            if grad_bias is not None:
                grad_bias += of_logits.sum(0)
            if grad_weight is not None and grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(of_logits.T, hidden[together])
            elif grad_weight is not None:
                grad_weight.add_(of_logits.T @ hidden[together])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the temperature-scaled distribution, in fp32 or above. Raises ValueError for a temperature of 0."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive; greedy decoding has no log-probabilities")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature
