"""The policy of a command that trains nothing: where it is, how it is loaded, and how it samples."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from grpo.run.memory_errors import Phase, phase
from grpo.source.policy_source import PolicySource, find_policy, load_found
from grpo.task.check import check_plan
from grpo.task.sampling import environment_of, sampling_params
from policies.policy import Policy
from rollout.sampling import SamplingParams


class PolicyInUse:
    """Finds and loads the policy that `config.model` names. Raises what the plan refuses, before any weight is read."""

    def __init__(self, config: Any) -> None:
        self.config, self.source = config, find_policy(config.model)
        self.environment = environment_of(config)
        check_plan(config, self.source)

    def load(self, newer: PolicySource | None = None) -> Policy:
        """Returns the policy as the options ask for it, or a newer one of the same run."""
        return load_found(newer or self.source, self.config)

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        return phase(name, self.config)

    def sampling(
        self, policy: Policy, completions: int = 1, seed: int = 0, stops: tuple[str, ...] = ()
    ) -> SamplingParams:
        """Returns how the policy answers by the options, with their environment."""
        params = sampling_params(policy, self.config.rollout, completions, seed)
        return replace(params, stop_strings=stops, environment=self.environment)
