"""What a value function is for: advantages of every token, weights by rank, and the loss that the values learn by.

Shapes are those of advantages.py and losses.py: P prompts of G completions, B completions padded to T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.algorithm.advantages import Rewards, as_tensor, normalize, same
from policies.devices import wide

CLIPRANGE = 0.2  # PPO's, and TRL's cliprange_value: a value that moved further learns no further from the same batch


@torch.no_grad()
def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, for PPO. Returns (advantages [B, T], returns [B, T]), 0 off the mask.

    δ_t = r_t + V_{t+1} - V_t and Â_t = δ_t + λ Â_{t+1}, with V = 0 after the last token (Schulman et al.,
    arXiv:1506.02438, eq. 16; PPO, arXiv:1707.06347, eq. 11-12; their discount γ is 1 here). Returns are Â + V, the
    targets of the value function. What is off the mask is passed over: padding, and tokens that a tool wrote between
    two sampled ones.

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.8, 9.0]])
    >>> gae(rewards, values, torch.tensor([[True, True, False]]), lam=0.5)   # δ = 0.3, 0.2
    (tensor([[0.4000, 0.2000, 0.0000]]), tensor([[0.9000, 1.0000, 0.0000]]))
    """
    rewards_BT, values_BT = rewards_BT.masked_fill(~mask_BT, 0.0), values_BT.masked_fill(~mask_BT, 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    advantage_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + next_value_B - values_BT[:, t]
        advantage_B = torch.where(mask_BT[:, t], delta_B + lam * advantage_B, advantage_B)
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
        advantages_BT[:, t] = advantage_B
    advantages_BT = advantages_BT.masked_fill(~mask_BT, 0.0)
    return advantages_BT, advantages_BT + values_BT


def outcome_rewards(rewards_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Token rewards for `gae`: a completion's reward on its last token, 0 elsewhere. [B], [B, T] -> [B, T].

    Raises ValueError for a NaN reward on a completion that is not masked out.

    >>> outcome_rewards(torch.tensor([1.0, 2.0]), torch.tensor([[True, True, False], [True, True, True]]))
    tensor([[0., 1., 0.],
            [0., 0., 2.]])
    """
    last_BT = mask_BT & (mask_BT.cumsum(dim=1) == mask_BT.sum(dim=1, keepdim=True))
    rewards_BT = torch.where(last_BT, rewards_B[:, None], 0.0)
    if rewards_BT.isnan().any():
        raise ValueError("a completion without a reward (None or NaN) reached GAE; clear its row of the mask first")
    return rewards_BT


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(x - mean) / (std + ε) over all masked-in tokens, 0 off the mask: PPO's advantage normalisation, [B, T].

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))   # mean 2, std √2
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    return normalize(wide(x_BT.masked_fill(~mask_BT, torch.nan))).nan_to_num(nan=0.0).to(x_BT)


def rank_softmax_weights(returns_PG: Rewards, temperature: float = 1.0) -> Tensor:
    """softmax(rank / temperature) within each group, [P, G] -> [P, G]: the weights of `advantage: rank_softmax`.

    Phase 1 of that variant takes advantages from a value function (`gae`). Phase 2, here, sorts the group by
    return, the worst at rank 0, and weighs it by softmax of rank. Phase 3 minimises -mean(weight · Â · log π):
    `policy_loss(loss_type="reinforce")` on weight · Â. Equal returns share their mean rank, so that each of n tied
    samples weighs 1/n; an abstained one weighs 0.

    >>> rank_softmax_weights([[7.0, -1.0, 2.0], [5.0, 5.0, None]])  # ranks 2, 0, 1: e², 1, e over their sum
    tensor([[0.6652, 0.0900, 0.2447],
            [0.5000, 0.5000, 0.0000]])
    """
    returns_PG = as_tensor(returns_PG)
    this_PG1, other_P1G = returns_PG[:, :, None], returns_PG[:, None, :]
    equal_PGG = same(other_P1G, this_PG1)
    rank_PG = ((other_P1G < this_PG1) & ~equal_PGG).sum(-1) + (equal_PGG.sum(-1) - 1) / 2
    rank_PG = rank_PG.masked_fill(returns_PG.isnan(), -torch.inf)
    return (rank_PG / temperature).softmax(dim=1).nan_to_num(nan=0.0).float()


def value_loss(
    values: Tensor,  # of the value head, with gradient
    old_values: Tensor,  # of the value head before this step
    returns: Tensor,
    mask: Tensor,
    *,
    num_completion_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ max((V - R)², (clip(V, V_old ± CLIPRANGE) - R)²), a mean over the step's tokens. Returns (summand, metrics).

    Source: PPO's released code; detail 9 of Huang et al., "The 37 implementation details of PPO", 2022.

    >>> values, returns = torch.tensor([[1.0, 0.1]]), torch.tensor([[2.0, 0.0]])
    >>> value_loss(values, torch.zeros(1, 2), returns, torch.tensor([[True, True]]))[0]  # ½ (1.8² + 0.1²) / 2
    tensor(0.8125)
    """
    num_tokens = max(1, int(mask.sum()) if num_completion_tokens is None else num_completion_tokens)
    clipped = old_values + (values - old_values).clamp(-CLIPRANGE, CLIPRANGE)
    squares, clipped_squares = (values - returns).square(), (clipped - returns).square()
    loss = torch.maximum(squares, clipped_squares).masked_fill(~mask, 0.0).sum() / num_tokens / 2
    clip_fraction = ((clipped_squares > squares) & mask).sum() / num_tokens
    return loss, {"loss/value": loss.detach(), "value/clip_fraction": clip_fraction}
