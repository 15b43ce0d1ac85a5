"""The processes in which the agent of a run works, and what can be seen beforehand not to work there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grpo.config.environment import AgentOptions
from rewards.config.reward import RewardsOptions, ScoringOptions
from rewards.isolation.agents import OWN
from rewards.isolation.pool import WorkerPool

WORKERS = 8  # processes, each for one completion at a time: an agent waits for the policy most of the time
TIMEOUT_S = 120.0  # where the options do not say; an agent thinks longer than a tool


def open_agents(options: AgentOptions) -> WorkerPool:
    """Return the processes in which the agent runs. Raises RewardError if they cannot load it, or have too little
    memory."""
    scoring = options.reward if isinstance(options, RewardsOptions) else ScoringOptions()
    pool = WorkerPool(
        [{"kind": "agent", "function": options.agent}],
        size=WORKERS,
        timeout_s=options.program_timeout_s or TIMEOUT_S,
        memory=(options.program_memory_mb or 0) << 20,
        pass_variables=scoring.pass_variables,
    )
    try:
        pool.run([])
    except BaseException:
        pool.close()
        raise
    return pool


def check_agent(options: AgentOptions, columns: Mapping[str, Any]) -> None:
    """Raises ValueError or RewardError where the agent cannot be called with these columns."""
    if same := [name for name in OWN if name in columns]:
        raise ValueError(f"agent={options.agent}: column {same[0]!r} has the name of what every agent gets; rename it")
    try:
        json.dumps(columns)
    except (TypeError, ValueError) as error:
        raise ValueError(f"agent={options.agent}: a column cannot be sent to it: {error}") from error
    open_agents(options).close()
