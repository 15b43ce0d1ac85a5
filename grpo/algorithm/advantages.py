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
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from grpo.config.loss import Aggregation, ScaleRewards
from rewards.ties import ABSOLUTE, RELATIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

Rewards: TypeAlias = Tensor | Sequence[Sequence[float | None]]

EPSILON = 1e-4
LARGEST_SCORE = 1e30  # the squares of 1e200 overflow, and float32 ends at 3e38


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
    rewards_PG = as_tensor(rewards_PG)
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
    rewards_PGK = as_tensor(rewards_PGK)
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
            return _zero_where(tied_P, normalize(total_PG)), tied_P
        case unknown:
            known = "'sum_then_normalize' or 'normalize_then_sum'"
            raise ValueError(f"multi_objective_aggregation={unknown!r} is unknown; use {known}")


def rloo(rewards_PG: Rewards) -> tuple[Tensor, Tensor]:
    """REINFORCE leave-one-out: Â_i = R_i - mean_{j≠i}(R_j) in the group. Returns (advantages [P, G], tied [P]).

    Source: Ahmadian et al., arXiv:2402.14740. It equals (R_i - mean(R)) · n / (n - 1).

    >>> rloo([[4, 1, 1, 0]])[0]             # 4 - 2/3, 1 - 5/3, 1 - 5/3, 0 - 6/3
    tensor([[ 3.3333, -0.6667, -0.6667, -2.0000]])
    """
    rewards_PG = as_tensor(rewards_PG)
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
    rewards_PG = as_tensor(rewards_PG)
    tied_P = tied_groups(rewards_PG)
    if baseline:
        return _zero_where(tied_P, normalize(rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True))), tied_P
    batch_tied = tied_groups(rewards_PG.reshape(1, -1))
    return _zero_where(batch_tied, normalize(rewards_PG)), tied_P


def tied_groups(rewards_PG: Rewards) -> Tensor:
    """Tells of each group [P] whether it is `tied` (rewards/ties.py)."""
    rewards_PG = as_tensor(rewards_PG)
    highest_P = rewards_PG.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest_P = rewards_PG.nan_to_num(nan=torch.inf).amin(dim=1)
    return (lowest_P >= highest_P) | same(lowest_P, highest_P)


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() <= ABSOLUTE + RELATIVE * torch.maximum(a.abs(), b.abs())


def as_tensor(rewards: Tensor | Sequence) -> Tensor:
    """fp64 rewards from a tensor or nested lists; None becomes NaN.

    Raises ValueError for a reward beyond ±LARGEST_SCORE, whose advantage would be 0 or infinite.
    """
    rewards = rewards if isinstance(rewards, Tensor) else torch.from_numpy(np.array(rewards, dtype=np.float64))
    rewards = rewards.detach().double()
    if (overflows := rewards.abs() > LARGEST_SCORE).any():
        where = overflows.nonzero()[0].tolist()
        raise ValueError(
            f"the reward at {where} is {rewards[tuple(where)].item()}; return a number between ±{LARGEST_SCORE:g}, or "
            "None to abstain"
        )
    return rewards


def _nanstd(x: Tensor, dim: int) -> Tensor:
    """Unbiased std of what is not NaN; NaN below two values."""
    count = (~x.isnan()).sum(dim=dim, keepdim=True)
    squares = (x - x.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return (squares / (count - 1)).sqrt()


def normalize(x: Tensor) -> Tensor:
    return (x - x.nanmean()) / (_nanstd(x.flatten(), dim=0) + EPSILON)


def _zero_where(tied_P: Tensor, advantages_PG: Tensor) -> Tensor:
    return advantages_PG.masked_fill(tied_P[:, None], 0.0).nan_to_num(nan=0.0).float()
