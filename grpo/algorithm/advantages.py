"""Advantages: how much better was a completion than we expected?

Shapes: P prompts with a group of G completions each, K reward functions, B completions padded to T tokens.

A reward of None or NaN means that the sample abstained or was dropped (or fills up a shorter group). It takes no
part in any mean or std, and its advantage is 0. A group whose remaining rewards are all equal, or fewer than two,
is *tied*: group-relative estimators give it exactly 0, not the rounding residue of `rewards - mean` divided by a
std of almost nothing. Equal means the same up to rounding (`tied`), here and wherever else a tie is asked for.

Conventions are TRL's: std divides by n - 1, and EPSILON is added to it. Arithmetic is fp64, results are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from grpo.algorithm.ties import ABSOLUTE, RELATIVE
from grpo.config.loss import Aggregation, ScaleRewards

Rewards: TypeAlias = Tensor | Sequence[Sequence[float | None]]

EPSILON = 1e-4


def group_relative(rewards_PG: Rewards, scale_rewards: ScaleRewards = "group") -> tuple[Tensor, Tensor]:
    """GRPO: Â = (R - mean(R)) / (std(R) + ε). Returns (advantages [P, G], tied [P]).

    The mean is the group's. `scale_rewards` chooses the std: of the "group" (DeepSeekMath, arXiv:2402.03300,
    §4.1.2), of the whole "batch" (Lite PPO, arXiv:2508.08221), or "none" (Dr. GRPO, arXiv:2503.20783).
    Raises ValueError for an unknown `scale_rewards` or an infinite reward.

    >>> advantages_PG, tied_P = group_relative([[1, 0, 0, 1], [1, 1, 1, 1], [1, None, 0, None]])
    >>> advantages_PG                       # group 1: mean 1/2, std √(1/3); group 3: mean 1/2, std √(1/2)
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000],
            [ 0.7070,  0.0000, -0.7070,  0.0000]])
    >>> tied_P
    tensor([False,  True, False])
    """
    rewards_PG = _as_tensor(rewards_PG)
    advantages_PG = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)
    match scale_rewards:
        case "group":
            advantages_PG = advantages_PG / (_nanstd(rewards_PG, dim=1) + EPSILON)
        case "batch":
            advantages_PG = advantages_PG / (_nanstd(rewards_PG.flatten(), dim=0) + EPSILON)
        case "none":
            pass
        case _:
            raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; use 'group', 'batch' or 'none'")
    tied_P = tied_groups(rewards_PG)
    return _zero_where(tied_P, advantages_PG), tied_P


def multi_objective(
    rewards_PGK: Tensor | Sequence[Sequence[Sequence[float | None]]],
    reward_weights: Sequence[float],
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
    scale_rewards: ScaleRewards = "group",
) -> tuple[Tensor, Tensor]:
    """Several weighted rewards. Returns (advantages [P, G], tied [P]).

    "sum_then_normalize": Â = group_relative(Σ_k w_k R_k, scale_rewards).
    "normalize_then_sum" (GDPO, arXiv:2601.05242): every reward is made group-relative on its own, so that one with
    a small spread still counts; the weighted sum is then normalised over the batch, whatever `scale_rewards` is.
    A reward that abstained adds nothing to its sample; a sample abstains when all of its rewards do. A group is tied
    when its sums Σ_k w_k R_k are, in both cases, and then gets 0 even if its rewards differ one by one.

    >>> right_and_short = [[[1, 0.1], [1, 0.3], [0, 0.2]]]          # one group of 3, two rewards
    >>> multi_objective(right_and_short, [1, 1])[0]                 # R = 1.1, 1.3, 0.2
    tensor([[ 0.3981,  0.7394, -1.1376]])
    >>> multi_objective(right_and_short, [1, 1], "normalize_then_sum")[0]
    tensor([[-0.2984,  1.1152, -0.8168]])
    """
    rewards_PGK = _as_tensor(rewards_PGK)
    if len(reward_weights) != rewards_PGK.shape[-1]:
        raise ValueError(f"{len(reward_weights)} reward_weights for {rewards_PGK.shape[-1]} rewards; give one each")
    weights_K = torch.tensor(reward_weights, dtype=torch.float64, device=rewards_PGK.device)
    abstained_PG = rewards_PGK.isnan().all(dim=-1)
    score_PG = (rewards_PGK * weights_K).nansum(dim=-1).masked_fill(abstained_PG, torch.nan)
    match multi_objective_aggregation:
        case "sum_then_normalize":
            return group_relative(score_PG, scale_rewards)
        case "normalize_then_sum":
            parts_KPG = torch.stack([group_relative(rewards_PG)[0] for rewards_PG in rewards_PGK.unbind(-1)])
            total_PG = torch.einsum("kpg,k->pg", parts_KPG.double(), weights_K).masked_fill(abstained_PG, torch.nan)
            tied_P = tied_groups(score_PG)
            return _zero_where(tied_P, _normalize(total_PG)), tied_P
        case unknown:
            known = "'sum_then_normalize' or 'normalize_then_sum'"
            raise ValueError(f"multi_objective_aggregation={unknown!r} is unknown; use {known}")


def rloo(rewards_PG: Rewards) -> tuple[Tensor, Tensor]:
    """REINFORCE leave-one-out: Â_i = R_i - mean_{j≠i}(R_j) in the group. Returns (advantages [P, G], tied [P]).

    Source: Ahmadian et al., arXiv:2402.14740. It equals (R_i - mean(R)) · n / (n - 1).

    >>> rloo([[4, 1, 1, 0]])[0]             # 4 - 2/3, 1 - 5/3, 1 - 5/3, 0 - 6/3
    tensor([[ 3.3333, -0.6667, -0.6667, -2.0000]])
    """
    rewards_PG = _as_tensor(rewards_PG)
    count_P1 = rewards_PG.isfinite().sum(dim=1, keepdim=True)
    others_PG = (rewards_PG.nansum(dim=1, keepdim=True) - rewards_PG) / (count_P1 - 1)
    tied_P = tied_groups(rewards_PG)
    return _zero_where(tied_P, rewards_PG - others_PG), tied_P


def reinforce_plus_plus(rewards_PG: Rewards, *, baseline: bool = False) -> tuple[Tensor, Tensor]:
    """REINFORCE++: Â = (R - mean_batch(R)) / (std_batch(R) + ε). Returns (advantages [P, G], tied [P]).

    Source: Hu et al., arXiv:2501.03262, "global advantage normalization". With `baseline=True`, the form for
    groups, R - mean_group(R) takes the place of R. Without it the estimator is not group-relative: a tied group is
    flagged but keeps its advantage, and only a wholly tied batch is 0. Every completion weighs the same in mean
    and std (OpenRLHF weighs it by its tokens).

    >>> reinforce_plus_plus([[1, 1], [1, 0]])[0]                    # mean 3/4, std 1/2
    tensor([[ 0.4999,  0.4999],
            [ 0.4999, -1.4997]])
    >>> reinforce_plus_plus([[1, 1], [1, 0]], baseline=True)[0]     # 0, 0, 1/2, -1/2 over std √(1/6)
    tensor([[ 0.0000,  0.0000],
            [ 1.2244, -1.2244]])
    """
    rewards_PG = _as_tensor(rewards_PG)
    tied_P = tied_groups(rewards_PG)
    if baseline:
        return _zero_where(tied_P, _normalize(rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True))), tied_P
    batch_tied = tied_groups(rewards_PG.reshape(1, -1))
    return _zero_where(batch_tied, _normalize(rewards_PG)), tied_P


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
    returns_PG = _as_tensor(returns_PG)
    this_PG1, other_P1G = returns_PG[:, :, None], returns_PG[:, None, :]
    equal_PGG = _same(other_P1G, this_PG1)
    rank_PG = ((other_P1G < this_PG1) & ~equal_PGG).sum(-1) + (equal_PGG.sum(-1) - 1) / 2
    rank_PG = rank_PG.masked_fill(returns_PG.isnan(), -torch.inf)
    return (rank_PG / temperature).softmax(dim=1).nan_to_num(nan=0.0).float()


def distill(old_logprobs_BT: Tensor, teacher_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """On-policy distillation: Â_t = log π_T(y_t) - log π_old(y_t), 0 off the mask. [B, T] of three -> [B, T].

    Its policy gradient is in expectation minus the gradient of KL(π || π_T) of the next token, at the states that the
    policy itself has reached (Gu et al., MiniLLM, arXiv:2306.08543, eq. 3-4, without what a token does to later ones;
    Lu et al., On-Policy Distillation, 2025). The mean of -Â over tokens estimates that KL.

    >>> old, teacher = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    >>> distill(old, teacher, torch.tensor([[True, True]]))                     # -log 2, log 2
    tensor([[-0.6931,  0.6931]])
    """
    return (teacher_logprobs_BT - old_logprobs_BT).detach().masked_fill(~mask_BT, 0.0)


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, for PPO. Returns (advantages [B, T], returns [B, T]), 0 off the mask.

    δ_t = r_t + γ V_{t+1} - V_t and Â_t = δ_t + γλ Â_{t+1}, with V = 0 after the last token (Schulman et al.,
    arXiv:1506.02438, eq. 16; PPO, arXiv:1707.06347, eq. 11-12). Returns are Â + V, the targets of the value
    function. What is off the mask is passed over: padding, and tokens that a tool wrote between two sampled ones.

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.8, 9.0]])
    >>> gae(rewards, values, torch.tensor([[True, True, False]]), gamma=1.0, lam=0.5)   # δ = 0.3, 0.2
    (tensor([[0.4000, 0.2000, 0.0000]]), tensor([[0.9000, 1.0000, 0.0000]]))
    """
    rewards_BT, values_BT = rewards_BT.masked_fill(~mask_BT, 0.0), values_BT.masked_fill(~mask_BT, 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    advantage_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * advantage_B, advantage_B)
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
    return _normalize(x_BT.double().masked_fill(~mask_BT, torch.nan)).nan_to_num(nan=0.0).to(x_BT.dtype)


def tied_groups(rewards_PG: Rewards) -> Tensor:
    """[P] bool: `tied` (grpo/algorithm/ties.py) for each group."""
    rewards_PG = _as_tensor(rewards_PG)
    highest_P = rewards_PG.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest_P = rewards_PG.nan_to_num(nan=torch.inf).amin(dim=1)
    return (lowest_P >= highest_P) | _same(lowest_P, highest_P)


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() <= ABSOLUTE + RELATIVE * torch.maximum(a.abs(), b.abs())


def _as_tensor(rewards: Any) -> Tensor:
    """fp64 rewards from a tensor or nested lists; None becomes NaN."""
    rewards = rewards if isinstance(rewards, Tensor) else torch.from_numpy(np.array(rewards, dtype=np.float64))
    rewards = rewards.detach().double()
    if rewards.isinf().any():
        where = rewards.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"the reward at {where} is {rewards[tuple(where)].item()}; return a finite number, or None to abstain"
        )
    return rewards


def _nanstd(x: Tensor, dim: int) -> Tensor:
    """Unbiased std of what is not NaN; NaN below two values."""
    count = (~x.isnan()).sum(dim=dim, keepdim=True)
    squares = (x - x.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return (squares / (count - 1)).sqrt()


def _normalize(x: Tensor) -> Tensor:
    return (x - x.nanmean()) / (_nanstd(x.flatten(), dim=0) + EPSILON)


def _zero_where(tied_P: Tensor, advantages_PG: Tensor) -> Tensor:
    return advantages_PG.masked_fill(tied_P[:, None], 0.0).nan_to_num(nan=0.0).float()
