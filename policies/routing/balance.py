"""Three mechanisms that keep a router's experts equally busy, alone or together, and statistics of the load.

s_te is the sigmoid score of token t for expert e, g_te = s_te / Σ_e s_te its *gate*: a distribution over the experts.
Axes: N tokens, E routed experts, k of them chosen by each token, S sequences, L layers with a router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SOFTNESS = 0.3  # of a soft choice, in units of a router's logits


def gates(router_logits_NE: Tensor) -> Tensor:
    """Scores normalised over all experts, [N, E], in fp32 (DeepSeek-V3, arXiv:2412.19437, eq. 19)."""
    scores = router_logits_NE.float().sigmoid().clamp_min(torch.finfo(torch.float32).tiny)
    return scores / scores.sum(-1, keepdim=True)


def entropy(gates_NE: Tensor) -> Tensor:
    """−Σ_e g log g of each token in nats, [N]. It is log E if all experts are equally good.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))             # log 2 = 0.6931
    tensor([0.6931, 0.0000])
    """
    return torch.special.entr(gates_NE).sum(-1)


def entropy_regulariser(router_logits_NE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """log E − H(mean soft choice), to be minimised: 0 where all experts are chosen equally often, log E at most.

    A token chooses the k experts of the largest score + bias: expert e where its logit is above that of the score
    m − b_e, with m the middle between the k-th and the next. The soft choice is the sigmoid of how far above, divided
    by 0.3 and normalised over the experts. So the gradient moves what is near the step, and does not ask that gates be
    alike. Expert groups are not looked at. The mean is over the N tokens given; of a batch that is cut into parts, each
    is to be balanced on its own. Where all experts are chosen it is 0.

    The usual −H(mean gate) + mean H(gate), the mutual information of token and expert, left experts at 42 to 59 % of an
    even 50 % (benchmarks/RESULTS.md), since equal mean gates do not make equal choices.

    >>> logits = torch.tensor([[0.3 * math.log(3), -0.3 * math.log(3)]])    # soft choices ¾ and ¼
    >>> entropy_regulariser(logits, torch.zeros(2), 1)                      # log 2 − H(¾, ¼)
    tensor(0.1308)
    """
    experts = router_logits_NE.shape[1]
    if top_k == experts:
        return router_logits_NE.new_zeros((), dtype=torch.float32)
    logits = router_logits_NE.float()
    with torch.no_grad():
        middle = (logits.sigmoid() + bias_E).topk(top_k + 1, dim=-1).values[:, -2:].mean(-1, keepdim=True)
        step = (middle - bias_E).logit(eps=1e-6)
    chosen = ((logits - step) / SOFTNESS).sigmoid().clamp_min(torch.finfo(torch.float32).tiny)
    return math.log(experts) - entropy((chosen / chosen.sum(-1, keepdim=True)).mean(0))


def sequence_loss(router_logits_NE: Tensor, sequence_N: Tensor, sequences: int, top_k: int) -> Tensor:
    """Σ_e f_e P_e of each sequence, [S]: 1 if its experts are equally busy, E / k if the same k do everything.

    f_e = E / (k T) Σ_t 1[s_te among the k best of t] and P_e = 1/T Σ_t g_te, over the T tokens of the sequence; the
    k best are those of the plain scores, without bias and expert groups. `sequence_N` numbers each token's sequence
    from 0. A sequence without tokens gets 0. Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20, before its factor α.

    >>> logits = torch.tensor([[0.75, 0.25]] * 2).logit()               # two tokens, both want expert 0
    >>> sequence_loss(logits, torch.tensor([0, 0]), 1, top_k=1)         # f = (2, 0), P = (0.75, 0.25)
    tensor([1.5000])
    """
    shares = gates(router_logits_NE)
    experts = shares.shape[1]
    chosen = torch.zeros_like(shares).scatter_(1, router_logits_NE.topk(top_k, dim=-1).indices, experts / top_k)
    sums = shares.new_zeros(2, sequences, experts)
    sums = sums.index_add(1, sequence_N, torch.stack([chosen, shares]))
    lengths = sequence_N.new_zeros(sequences).index_add_(0, sequence_N, torch.ones_like(sequence_N)).clamp(min=1)
    return (sums[0] * sums[1]).sum(-1) / lengths**2


def move_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """b_e + rate · sign(mean(c) − c_e): experts that were chosen less than the mean become easier to choose.

    The bias affects which experts are chosen and not their weights, so it has no gradient and changes none.
    Source: auxiliary-loss-free balancing, arXiv:2408.15664, algorithm 1.

    >>> move_bias(torch.zeros(3), torch.tensor([5, 1, 3]), rate=0.5)    # the mean is 3
    tensor([-0.5000,  0.5000,  0.0000])
    """
    counts = counts_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(counts.mean() - counts)


def load_statistics(
    counts_LE: Tensor, entropy_L: Tensor, layers: Sequence[int], prefix: str = "moe"
) -> dict[str, float]:
    """Load of an expert relative to its even share, by the tokens routed to it: over all layers and for each.

    The names begin with `prefix`. `entropy_L`: mean entropy of a token's gate, nats. `layers` are the numbers of the L
    layers in the trunk.

    >>> load_statistics(torch.tensor([[2, 1, 1, 0]]), torch.tensor([1.25]), [3])
    {'moe/load_min': 0.0, 'moe/load_max': 2.0, 'moe/max_violation': 1.0, 'moe/router_entropy': 1.25,
     'moe/dead_experts': 1.0, 'moe/layer_3/load_min': 0.0, 'moe/layer_3/load_max': 2.0,
     'moe/layer_3/max_violation': 1.0, 'moe/layer_3/router_entropy': 1.25, 'moe/layer_3/dead_experts': 1.0}
    """
    load_LE = counts_LE / counts_LE.float().mean(dim=1, keepdim=True)
    each = {
        "load_min": load_LE.min(dim=1).values,
        "load_max": load_LE.max(dim=1).values,
        "max_violation": load_LE.max(dim=1).values - 1.0,
        "router_entropy": entropy_L,
        "dead_experts": (counts_LE == 0).sum(dim=1).float(),
    }
    metrics = {f"{prefix}/{name}": values.mean().item() for name, values in each.items()}
    metrics[f"{prefix}/dead_experts"] = each["dead_experts"].sum().item()
    for i, layer in enumerate(layers):
        metrics |= {f"{prefix}/layer_{layer}/{name}": values[i].item() for name, values in each.items()}
    return metrics
