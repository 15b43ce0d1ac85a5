"""Log-probabilities and entropies of tokens. Logits and tokens are shifted by one only here.

Everything is computed in fp32 (fp64 stays fp64) and under the temperature-scaled distribution, because the tokens were
sampled from that one (contract 2).

Shapes: B rows of T tokens, N scored positions, K tokens of each, vocabulary V, width D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policies.lm_head import LMHead

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

CHUNK = 256  # rows of logits held in fp32 at a time: 256 · 49,152 · 4 bytes = 50 MB
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
    elements: int = CHUNK_ELEMENTS,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies without all logits in memory at once: [N, D], [V, D], [N] -> [N], [N]. With
    `token_ids` [N, K] there are log-probabilities of K tokens at every position.

    At most `elements` logits are made at a time, a tile of some positions and some of the vocabulary, and again in the
    backward pass: memory grows with N and V, and with their product by two numbers a position and part. Differentiable
    in `hidden` and in the LM head, the entropy only with `entropy_grad=True`.

    >>> hidden, lm_head = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0986123]])
    >>> logprobs, entropies = logprobs_from_hidden(hidden, lm_head, torch.tensor([0, 1]))
    >>> logprobs.exp(), entropies                                   # log 2 and 2 log 2 - 3/4 log 3
    (tensor([0.5000, 0.7500]), tensor([0.6931, 0.5623]))
    """
    head = LMHead(lm_head) if isinstance(lm_head, Tensor) else lm_head
    bias = head.bias
    if head.scale != 1.0:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    how = _How(head.cap, temperature, elements, entropy_grad)
    ids_NK = token_ids.reshape(len(token_ids), math.prod(token_ids.shape[1:]))
    logprobs_NK, entropies = _Scored.apply(hidden, head.weight, bias, ids_NK, how)
    return logprobs_NK.view_as(token_ids), entropies


@dataclass(frozen=True)
class _How:
    cap: float | None
    temperature: float
    elements: int
    entropy_grad: bool

    def tiles(self, count: int, weight: Tensor, bias: Tensor | None) -> tuple[list[slice], list[tuple[slice, LMHead]]]:
        """Splits the positions, and the vocabulary with its rows of the LM head. Tiles are square: low ones would read
        the whole LM head for few positions."""
        wide = min(len(weight), math.isqrt(self.elements))
        high = max(1, self.elements // wide)
        parts = [slice(first, min(first + wide, len(weight))) for first in range(0, len(weight), wide)]
        heads = [LMHead(weight[of], None if bias is None else bias[of], cap=self.cap) for of in parts]
        rows = [slice(first, first + high) for first in range(0, count, high)]
        return rows, list(zip(parts, heads, strict=True))


def _columns(ids: Tensor, of: slice) -> tuple[Tensor, Tensor]:
    """Which ids are of this part of the vocabulary, and their places in it, any for the others."""
    columns = ids - of.start
    places = columns.clamp(0, of.stop - of.start - 1)
    return columns == places, places


class _Scored(torch.autograd.Function):
    """Scores tile by tile. With log p = x - log Z: ∂ log p_i / ∂x_j = 1[i = j] - p_j and ∂H / ∂x_j = -p_j (log p_j +
    H). Of a capped logit y = c tanh(z / c) the slope is ∂y / ∂z = 1 - (y / c)².

    A vocabulary of parts P, each with its own log Z_P and H_P, has log Z = log Σ Z_P, and with the shares w_P = Z_P / Z
    the entropy Σ w_P (H_P - log w_P).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids_NK: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        rows, parts = how.tiles(len(hidden), weight, bias)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits_NK = hidden.new_full(ids_NK.shape, math.nan, dtype=dtype)  # of an id that is no token's it stays
        totals_PN, sums_PN = (hidden.new_empty(len(parts), len(hidden), dtype=dtype) for _ in range(2))  # log Z_P, -H_P
        for at in rows:
            for part, (of, head) in enumerate(parts):
                x = scaled(head.logits(hidden[at]), how.temperature)
                inside, columns = _columns(ids_NK[at], of)
                torch.where(inside, x.gather(-1, columns), logits_NK[at], out=logits_NK[at])
                totals = torch.logsumexp(x, -1, out=totals_PN[part, at])
                totals.clamp_(min=torch.finfo(dtype).min)  # a part may have -∞ alone
                log_p = x.sub_(totals[:, None]).clamp_(min=LEAST_LOGPROB)
                torch.sum(log_p.exp().mul_(log_p), -1, out=sums_PN[part, at])
        totals_N = totals_PN.logsumexp(0)
        log_share_PN = (totals_PN - totals_N).clamp_(min=LEAST_LOGPROB)
        entropies_N = -(log_share_PN.exp() * (sums_PN + log_share_PN)).sum(0)
        ctx.save_for_backward(hidden, weight, bias, ids_NK, totals_N, entropies_N)
        ctx.how = how
        ctx.set_materialize_grads(False)
        if not how.entropy_grad:
            ctx.mark_non_differentiable(entropies_N)
        return logits_NK - totals_N[:, None], entropies_N

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids_NK, totals, entropies = ctx.saved_tensors
        how: _How = ctx.how
        rows, parts = how.tiles(len(hidden), weight, bias)
        of_logprob, of_entropy = (
            totals.new_zeros(shape) if gradient is None else gradient.reshape(shape) / how.temperature
            for gradient, shape in zip(gradients, (ids_NK.shape, (len(hidden), 1)), strict=True)
        )
        of_all_N1 = of_logprob.sum(-1, keepdim=True)
        # Sums are in fp32, since bf16 would lose a little of them with every tile.
        of_hidden = torch.zeros_like(hidden, dtype=totals.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for of, head in parts:
            of_weight = torch.zeros_like(head.weight, dtype=totals.dtype)
            of_bias = totals.new_zeros(len(head.weight))
            for at in rows:
                logits = head.logits(hidden[at])
                slope = None if how.cap is None else 1 - (logits / how.cap) ** 2
                x = scaled(logits, how.temperature).sub_(totals[at, None])
                upstream = of_all_N1[at]
                if gradients[1] is None:
                    x = x.exp_().mul_(-upstream)
                else:
                    p = x.exp()
                    x.clamp_(min=LEAST_LOGPROB).add_(entropies[at, None]).mul_(of_entropy[at]).add_(upstream)
                    x = p.mul_(x).neg_()
                inside, columns = _columns(ids_NK[at], of)
                x.scatter_add_(1, columns, of_logprob[at] * inside)
                of_logits = (x if slope is None else x * slope).to(hidden.dtype)
                of_hidden[at] += of_logits @ head.weight
                if grad_weight is not None:
                    of_weight += of_logits.T @ hidden[at]
                if grad_bias is not None:
                    of_bias += of_logits.sum(0)
            if grad_weight is not None:
                grad_weight[of] = of_weight
            if grad_bias is not None:
                grad_bias[of] = of_bias
        return of_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the temperature-scaled distribution, in fp32 or above. Raises ValueError for a temperature of 0."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive; greedy decoding has no log-probabilities")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature
