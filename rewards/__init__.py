"""Rewards: plain Python functions from a completion to a number. Importing this loads neither torch nor ray."""

from rewards.group_score import GroupScore, RewardFailed, RewardFailure
from rewards.protocol import RewardError, Signature, per_completion, right_at, text_of
from rewards.registry import BUILT_IN, load_reward
from rewards.scorer import Scorer
from rewards.spec import RewardSpec

__all__ = [
    "BUILT_IN",
    "GroupScore",
    "RewardError",
    "RewardFailed",
    "RewardFailure",
    "RewardSpec",
    "Scorer",
    "Signature",
    "load_reward",
    "per_completion",
    "right_at",
    "text_of",
]
