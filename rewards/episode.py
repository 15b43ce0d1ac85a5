"""What a reward reads of an episode with tools, an environment or an agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REWARD = "environment_reward"  # the column that the reward `environment` reads
AGENT_REWARD = "agent_reward"  # and the one that the reward `agent` reads


@dataclass
class ToolStats:
    """What the tools of one episode did: `calls` that were made, `errors` that tools raised, and `bad_calls` that named
    no tool, had wrong arguments or could not be read. `reward` is what the environment's `get_reward` gave. `failure`
    says why the environment could not go on, `{"kind": ..., "message": ...}`. Of an external agent `calls` are its
    requests, `errors` those that got no answer, `bad_calls` answers with a call that could not be read or named no tool
    that it had offered, and `reward` is what it returned.
    """

    calls: int = 0
    errors: int = 0
    bad_calls: int = 0
    reward: float | None = None
    failure: dict[str, str] | None = None


def answer_of(text: str, turns: list[dict[str, Any]]) -> str:
    """The text of the policy's last turn, or `text` without turns.

    >>> answer_of("4.5>>5", [{"role": "tool", "content": "4.5"}, {"role": "assistant", "content": "5"}])
    '5'
    """
    texts = [message["content"] for message in turns if message["role"] == "assistant"]
    return texts[-1] if texts else text


def environment_reward(tools: ToolStats | None) -> float | str | None:
    """A number, None to abstain, or why the environment could not go on."""
    if tools is None:
        return None
    failure = tools.failure
    return tools.reward if failure is None else f"{failure['kind']}: {failure['message']}"
