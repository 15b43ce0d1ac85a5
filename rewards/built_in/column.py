"""Rewards that exist already: in the data, from a reward model of the run, from the environment of an episode or from
its agent."""

from __future__ import annotations

import math

from rewards.protocol import Completions


def column(prompts: list | None, completions: Completions, name: str, **columns) -> list[float | None]:
    """The values of the column `name`, as they are; None abstains.

    Raises ValueError if there is no such column, or if a value is not a finite number.

    >>> column(None, ["so 4", "so 5"], name="helpfulness", helpfulness=[0.25, -1])
    [0.25, -1.0]
    """
    if name not in columns:
        raise ValueError(f"there is no column {name!r}; the columns are {', '.join(sorted(columns)) or 'none'}")
    for value in columns[name]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not is_number:
            raise ValueError(f"column {name!r} holds {value!r}, which is not a finite number")
    return [None if value is None else float(value) for value in columns[name]]


def environment(
    prompts: list | None, completions: Completions, environment_reward: list[float | str | None], **_
) -> list[float | ValueError | None]:
    """Gives what each completion's environment gave (`get_reward`); None abstains. Runs with tools have this reward.

    A text in its place says why the environment could not go on: that is a failure of the completion.

    >>> environment(None, ["so 4", "so 5"], environment_reward=[0.25, None])
    [0.25, None]
    """
    return [_score(value, "the environment could not go on") for value in environment_reward]


def agent(
    prompts: list | None, completions: Completions, agent_reward: list[float | str | None], **_
) -> list[float | ValueError | None]:
    """Gives what the agent of each completion returned; None abstains. Runs with an agent have this reward.

    A text in its place says why the agent has failed: that is a failure of the completion.

    >>> agent(None, ["so 4", "so 5"], agent_reward=[0.25, None])
    [0.25, None]
    """
    return [_score(value, "the agent has failed") for value in agent_reward]


def _score(value: float | str | None, failed: str) -> float | ValueError | None:
    if isinstance(value, str):
        return ValueError(f"{failed}: {value}")
    return None if value is None else float(value)
