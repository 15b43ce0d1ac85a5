"""Maximum likelihood RL (arXiv:2602.02710): Â = (R − mean) / mean of the group, which is 0 where none is right."""

from pathlib import Path

from torch import Tensor

from grpo import advantage

OPTIONS = {"loss.advantage": f"{Path(__file__).resolve()}:maxrl", "loss.scale_rewards": "group"}


@advantage
def maxrl(rewards_PG: Tensor) -> Tensor:
    """Gives Â [P, G] of rewards that are 0 or 1.

    >>> maxrl(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))              # mean 1/4: 3/4 / 1/4, -1
    tensor([[ 3., -1., -1., -1.],
            [ 0.,  0.,  0.,  0.]])
    """
    mean_P1 = rewards_PG.nanmean(dim=1, keepdim=True)
    return ((rewards_PG - mean_P1) / mean_P1.clamp(min=1e-6)).nan_to_num(0.0)
