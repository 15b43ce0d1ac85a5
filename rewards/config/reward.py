"""Options of rewards: which functions, which models, and what happens when one fails."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field, field_validator, model_validator

from rewards.config.options import Options
from rewards.group_score import FailurePolicy
from rewards.protocol import Reward, RewardError
from rewards.registry import name_callable

Config = TypeVar("Config", bound=BaseModel)


class FunctionOptions(Options):
    """Which function, and its weight."""

    function: str
    """A built-in name (`gsm8k`, ...), `path/to/file.py:function`, `module:function`, `verl:file.py:compute_score`, or
    `model:` and a folder, a run or a hub id: a reward model. `chat:` before a function passes prompts and completions
    as chat messages instead of strings."""
    weight: float = 1.0
    """Its weight in the score."""
    name: str | None = None
    """Its name in metrics; the function's own by default. The scores of a reward model are also a column of that name.
    """


class CallOptions(Options):
    """How a reward function is called; every command that scores has these options."""

    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function, such as {target: 30}. A reward model has `kind` and `label`. `kind`: a
    `classifier` (the default) reads question and completion as one text, a `chat_classifier` through its own chat
    template. `perplexity` is that of the completion under a language model with its own tokenizer: 1 or more, and lower
    is better, so give it a negative weight. `label`: the number of the label of a classifier whose logit is the score,
    required if there is more than one."""


class RewardOptions(CallOptions, FunctionOptions):
    """One reward function."""


class ScoringOptions(Options):
    """How rewards are run, and what happens when one fails."""

    on_error: str = "abort"
    """When a reward fails: `abort`, `drop_sample`, `drop_group` or `score=x`. A failure is never silently a zero."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Wall-clock seconds that a reward may take per batch, and per completion when the batch is rerun one by one."""
    pass_variables: list[str] = Field(default_factory=list)
    """Environment variables that rewards and agents may read, such as [OPENAI_API_KEY], besides the usual few (PATH,
    HOME, LANG, PYTHONPATH, OMP_NUM_THREADS, HF_HOME, ...). The list is written to config.yaml, the values are not."""

    @field_validator("on_error")
    @classmethod
    def _is_a_policy(cls, on_error: str) -> str:
        try:
            FailurePolicy.parse(on_error)
        except RewardError:
            raise ValueError("choose abort, drop_sample, drop_group or score=<number>, such as score=0") from None
        return on_error


class RewardsOptions(Options):
    """What scores completions; training and evaluation have these options."""

    rewards: list[RewardOptions] = Field(default_factory=lambda: [RewardOptions(function="gsm8k")])
    """Reward functions: one by its name, such as `mine.py:f`, or a list. The score is their weighted sum. The first one
    judges held-out completions: evaluation reports accuracy if it scores them as correct or incorrect
    (`rewards.right_at`, or all scores are 0 and 1), otherwise the mean reward. An empty list is for an environment or
    an agent that has a reward."""
    reward: ScoringOptions = ScoringOptions()

    @field_validator("rewards", mode="before")
    @classmethod
    def _by_name(cls, rewards: object) -> object:
        """Read `mine.py:f` as a list of one function, and each name in a list as a function of weight 1."""
        if isinstance(rewards, str) and re.match(r"[\w./~]", rewards):  # else it is a list with a slip in it
            rewards = [rewards]
        if not isinstance(rewards, list):
            return rewards
        return [{"function": reward} if isinstance(reward, str) else reward for reward in rewards]

    @model_validator(mode="after")
    def _scores(self) -> RewardsOptions:
        if not self.rewards and not getattr(self, "environment", None) and not getattr(self, "agent", None):
            raise ValueError("rewards=[] scores nothing; name a reward, or an environment or agent that has one")
        return self


def with_rewards(config: Config, reward: Reward | Sequence[Reward] | None) -> Config:
    """`config` with these functions of this process as its rewards; they are called here, without a time limit."""
    if reward is None:
        return config
    functions = reward if isinstance(reward, Sequence) else [reward]
    return config.model_copy(update={"rewards": [RewardOptions(function=name_callable(one)) for one in functions]})
