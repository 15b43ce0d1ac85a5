"""The environment of a run as its task sees it: checked early, shown by solutions, and a part of the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.examples import Example
from grpo.learner.batch import PackedRow, Sample
from rollout.environments.episodes import first_messages
from rollout.environments.format import TurnFormat
from rollout.environments.protocol import check, chosen, tools_of
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.sampling import EnvironmentSpec

REWARD = "environment_reward"  # the column that the reward `environment` reads


class Actor:
    """What a task has to know of an environment; nothing without one.

    Raises ValueError or RewardError, before a policy is loaded, where it cannot begin with the first example.
    """

    def __init__(self, environment: EnvironmentSpec | None, example: Example) -> None:
        self.environment = environment
        if environment is not None:
            check(environment, example.columns)
        self._forms: dict[tuple[str, int], TurnFormat] = {}

    @property
    def acts(self) -> bool:
        return self.environment is not None

    @property
    def columns(self) -> list[str]:
        return [REWARD] if self.acts else []

    def added(self, columns: Sequence[Mapping[str, Any]], groups: Sequence[RolloutGroup]) -> list[Mapping[str, Any]]:
        """The columns of each group, with what the environments gave."""
        if not self.acts:
            return list(columns)
        return [
            {**own, REWARD: [_reward(completion) for completion in group.completions]}
            for own, group in zip(columns, groups, strict=True)
        ]

    def solution(self, prompt: Prompt, marked: str, tokenizer: PreTrainedTokenizerBase, stop: int) -> PackedRow:
        """A solution whose marks are calls, `<<48/2=24>>`, as an episode to learn from. `reset` is not called."""
        assert self.environment is not None
        name = chosen(self.environment, prompt.columns)
        if (name, stop) not in self._forms:
            tools = tools_of(self.environment, name)
            self._forms[name, stop] = TurnFormat(tokenizer, tools, stop_token_ids=[stop])
        form = self._forms[name, stop]
        ids, sampled = form.demonstration(marked)
        return PackedRow(form.tools_prompt(first_messages(prompt, None)), [Sample(0, ids, sampled=sampled)])


def _reward(completion: Completion) -> float | str | None:
    """A number, None to abstain, or why the environment could not go on."""
    if completion.tools is None:
        return None
    failure = completion.tools.failure
    return completion.tools.reward if failure is None else f"{failure['kind']}: {failure['message']}"
