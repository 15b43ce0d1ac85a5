"""The requests of agents, which vLLM decodes; what it has read of a conversation it finds in its prefix cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout.group import Completion
from rollout.relay import ROUNDS, Relay
from rollout.sampling import SamplingParams
from rollout.vllm.completions import Row, seed_of


class VLLMRelay(Relay):
    """Its server is asked for some steps at a time. A new one gets all requests that have not ended."""

    def __init__(self, pool: Any, version: int, params: SamplingParams, max_rows: int) -> None:
        """`pool` is the VLLMPool that has the server."""
        super().__init__(pool.policy, version, max_rows, pool.context)
        self.pool, self.params = pool, params
        self.held: set[int] = set()  # the numbers of the requests that the server has
        self.goes_on = False

    def exchange(self) -> Mapping[int, Completion]:
        answers = {int(name): turn for name, turn in self.pool._mended("answer", self._ask).items()}
        self.held -= set(answers)
        return {number: self._completion(number, turn) for number, turn in answers.items() if number in self.requests}

    def _ask(self) -> dict[str, Any]:
        """Raises Lost where the server is."""
        if self.pool.version is None:
            self.held, self.gone, self.goes_on = set(), set(), False
            self.pool._sync_again()
        gone = self.gone & self.held  # the others did not reach the server
        new = {number: request for number, request in self.requests.items() if number not in self.held}
        job = {
            "version": self.version,
            "goes_on": self.goes_on,
            "new": {str(number): self._row(number) for number in new},
            "gone": [str(number) for number in sorted(gone)],
            "steps": ROUNDS,
            "temperature": self.params.temperature,
            "stop_token_ids": list(self.params.stop_token_ids),
        }
        [answer] = self.pool.client.post("/answer", job, limit_s=self.pool.settings.silence_s)
        self.held = (self.held - gone) | set(new)
        self.gone, self.goes_on = set(), True
        return answer["completions"]

    def _row(self, number: int) -> list[Any]:
        request = self.requests[number]
        prompt, params = request.prompt, request.params
        seed = seed_of(params, prompt.prompt_id, prompt.first_sample, params.start)
        return [prompt.token_ids, seed, params.max_completion_tokens]

    def _completion(self, number: int, turn: Mapping[str, Any]) -> Completion:
        request = self.requests[number]
        row = Row(request.prompt, 0, self.pool.settings.draft_tokens)
        row.add(turn)
        completion = row.completion(self.policy.tokenizer, self.version, request.params.temperature)
        completion.cached = turn["cached"]
        return completion
