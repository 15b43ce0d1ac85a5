"""What an environment or an agent adds to the task of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from grpo.config.environment import AgentOptions
from grpo.learner.row import PackedRow, Sample
from grpo.task.sampling import Actor
from rewards.data.examples import Example
from rewards.episode import AGENT_REWARD, REWARD, environment_reward
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import EnvironmentSpec

if TYPE_CHECKING:
    from rollout.environments.format import Answers, TurnFormat


class Acting(Actor):
    """It is checked early, shown by solutions, and a part of the score.

    Raises ValueError or RewardError, before a policy is loaded, where it cannot begin with the first example.
    """

    def __init__(self, environment: EnvironmentSpec | None, agent: AgentOptions | None, example: Example) -> None:
        self.environment, self.agent = environment, agent
        self.columns = [REWARD if environment else AGENT_REWARD]
        if environment is not None:
            from rollout.environments.protocol import check

            check(environment, example.columns)
        if agent is not None:
            from grpo.endpoint.agents import check_agent

            check_agent(agent, example.columns)
        self._forms: dict[tuple[str, tuple[int, ...]], TurnFormat] = {}
        self._answers: dict[str, Answers | None] = {}

    def added(self, columns: Sequence[Mapping[str, Any]], groups: Sequence[RolloutGroup]) -> list[Mapping[str, Any]]:
        [name] = self.columns
        return [
            {**row, name: [environment_reward(completion.tools) for completion in group.completions]}
            for row, group in zip(columns, groups, strict=True)
        ]

    def solution(self, prompt: Prompt, marked: str, tokenizer: PreTrainedTokenizerBase, stop: int) -> PackedRow | None:
        """A solution whose marks are calls, `<<48/2=24>>`, as an episode to learn from. `reset` is not called.

        The results are the solution's own, or those of the tool where it is built in and `pure`, as in a rollout.
        """
        if self.environment is None:
            return None
        from rollout.environments.episodes import first_messages
        from rollout.environments.protocol import answers_of, chosen

        name = chosen(self.environment, prompt.columns)
        if name not in self._answers:
            self._answers[name] = answers_of(self.environment, name)
        form = self._form(prompt, tokenizer, (stop,))
        ids, sampled = form.demonstration(marked, self._answers[name])
        return PackedRow(form.tools_prompt(first_messages(prompt, None)), [Sample(0, ids, sampled=sampled)])

    def begun(
        self,
        prompt: Prompt,
        messages: list[dict[str, Any]] | None,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
    ) -> Prompt:
        """`reset` is not called."""
        if not (self.environment and messages):
            return prompt
        ids = self._form(prompt, tokenizer, tuple(stops)).tools_prompt(messages)
        return replace(prompt, text=str(tokenizer.decode(ids)), token_ids=ids, messages=messages)

    def _form(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> TurnFormat:
        from rollout.environments.format import TurnFormat
        from rollout.environments.protocol import chosen, tools_of

        assert self.environment is not None
        name = chosen(self.environment, prompt.columns)
        if (name, stops) not in self._forms:
            tools = tools_of(self.environment, name)
            self._forms[name, stops] = TurnFormat(tokenizer, tools, stop_token_ids=stops)
        return self._forms[name, stops]
