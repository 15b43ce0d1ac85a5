"""Options of tools, environments and agents, with which completions become episodes of several turns."""

from __future__ import annotations

from pydantic import Field, field_validator

from rewards.config.options import Options
from rewards.config.reward import RewardOptions, RewardsOptions

OF_EPISODES = ("environment", "agent")  # the rewards that hand over what an episode's own code gave


class EnvironmentOptions(Options):
    """What a policy acts in; training, evaluation and sampling have these options."""

    tools: list[str] = Field(default_factory=list)
    """Functions that the policy may call, `path/to/file.py:function`, with type hints and a docstring (as in TRL)."""
    environment: str | dict[str, str] | None = None
    """A class in TRL's contract, one object for each completion: `calculator`, `python`, `word_game`,
    `path/to/file.py:Class`, or the tools of an MCP server, by its command or its address: `mcp:python server.py`,
    `mcp:http://127.0.0.1:8000/mcp`. A mapping of names to classes lets the column `environment` of the data choose.
    What its `get_reward` gives is the reward `environment`."""
    max_turns: int = Field(default=8, ge=1)
    """Turns that the policy may take in one completion. The calls of the last one are made, and nothing follows."""
    program_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds that the calls of one turn may take, or one call of the agent; then its process is killed (see
    reward.on_error). null: 10 for tools and environments, 120 for an agent."""
    program_memory_mb: int | None = Field(default=None, ge=1)
    """Most MiB of data that a process of tools or of the agent may hold; null sets no limit. An episode that needs more
    fails alone (see reward.on_error)."""

    @property
    def has_tools(self) -> bool:
        return bool(self.tools or self.environment)

    @field_validator("environment")
    @classmethod
    def _has_names(cls, environment: str | dict[str, str] | None) -> str | dict[str, str] | None:
        if isinstance(environment, dict) and (not environment or "" in environment):
            raise ValueError("needs a name for each environment, which the column `environment` of the data holds")
        return environment


class AgentOptions(EnvironmentOptions):
    """A program that asks the policy by OpenAI's API; `quartet train` learns from what it asked."""

    agent: str | None = None
    """A function of yours, `path/to/file.py:function`, that is called once for each completion. It gets `base_url` and
    `api_key` for a client of OpenAI's API, `prompt` (the text of the prompt) and the columns of the example; it may be
    async. A number that it returns is the reward `agent`."""


def rewards_of(config: RewardsOptions) -> list[RewardOptions]:
    """The rewards of a run. With tools the one named `environment` is among them: it hands over what `get_reward` gave,
    and the failures of tools. With an agent the one named `agent` does so."""
    acts = isinstance(config, EnvironmentOptions) and config.has_tools
    name = "environment" if acts else "agent" if isinstance(config, AgentOptions) and config.agent else None
    if name is None or any(reward.function == name for reward in config.rewards):
        return config.rewards
    return [*config.rewards, RewardOptions(function=name)]
