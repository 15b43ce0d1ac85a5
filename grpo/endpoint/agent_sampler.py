"""A sampler whose completions are the episodes of an agent, which runs in processes of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from grpo.config.environment import AgentOptions
from grpo.endpoint.agents import WORKERS, open_agents
from grpo.endpoint.batcher import Batcher
from grpo.endpoint.episode import Episode
from grpo.endpoint.forks import ForkingEpisode
from rewards.isolation.pool import WorkerPool
from rollout.decoding.engine import Engine
from rollout.environments.protocol import seeds
from rollout.environments.thoughts import dropping
from rollout.faults import OnFinished, RolloutError, not_finite
from rollout.group import Prompt, RolloutGroup
from rollout.relay import Relay
from rollout.requests.conversations import CACHE_TOKENS
from rollout.sampling import SamplingParams
from rollout.workers.local_pool import LocalPool

METRICS = {
    "agent/branches_mean": "trajectory branches of an episode, mean; absent if every episode only continues its prompt",
    "agent/cached_tokens": "tokens of requests that earlier ones had read, absent if no cache is kept, count",
}
WAIT_S = 0.01  # that a request may wait for others before it joins the running batch
POLL_S = 0.1
ROWS_OF_WORKER = 8  # requests of one agent that are decoded together
NO_LIMIT = 1 << 30


class AgentSampler:
    """Samples with the engine, the workers or the server of `pool`, which stays open when this is closed. `temperature`
    is the run's."""

    def __init__(self, pool: Any, agent: AgentOptions, temperature: float) -> None:
        from grpo.endpoint.endpoint import Endpoint  # whose packages are an extra

        self.pool, self.agent, self.temperature, self.check_stop = pool, agent, temperature, pool.check_stop
        self._kind: type[Episode] | None = None
        self.endpoint = Endpoint()
        self._agents: WorkerPool | None = None
        self._thread = ThreadPoolExecutor(1, "agents")

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """Returns a group of episodes for each prompt; why an agent has failed is in `Completion.tools`. Raises
        RolloutError for a prompt that leaves no room for a completion, and where logits were not finite."""
        self.check_stop()
        engine = self._engine(replace(params, group_size=1))  # every episode has a prompt of its own
        engine.check(prompts, params)
        self._agents = self._agents or open_agents(self.agent)
        sampling = _Sampling(self, engine, prompts, params)
        future = self._thread.submit(sampling.run, self._agents)
        try:
            self._watch(future, sampling, on_finished)
            groups = future.result()
        except BaseException:
            self._end_agents()
            wait([future])
            raise
        finally:
            self.endpoint.forget()
            sampling.batcher.close()
        if fault := not_finite(groups):
            raise RolloutError(fault, groups)
        return groups

    def _engine(self, params: SamplingParams) -> Engine | Relay:
        rows = ROWS_OF_WORKER * WORKERS
        if isinstance(self.pool, LocalPool):
            engine = copy.copy(self.pool.synced_engine())
            engine.max_rows = min(engine.max_rows, rows)
            return engine
        relay: Relay = self.pool.relay(params, CACHE_TOKENS, rows)
        return relay

    def kind(self, engine: Engine | Relay) -> type[Episode]:
        """Where the chat template rewrites earlier answers, each turn is sampled after what a server would show."""
        if self._kind is None:  # the template stays
            self._kind = ForkingEpisode if dropping(engine.policy.tokenizer) else Episode
        return self._kind

    def keep_weights(self) -> None:
        self.pool.keep_weights()

    def _watch(self, future: Future[Any], sampling: _Sampling, on_finished: OnFinished | None) -> None:
        """Wait for the end. Raises what stops the run or has ended the decoding."""
        reported = 0
        while not wait([future], POLL_S).done:
            self.check_stop()
            sampling.check()
            if on_finished and (new := sampling.ended - reported):
                on_finished(new)
                reported += new
        sampling.check()
        if on_finished and not future.exception():
            on_finished(len(sampling.begun) - reported)

    def _end_agents(self) -> None:
        if self._agents is not None:
            self._agents.close()
            self._agents = None

    def close(self) -> None:
        self._end_agents()
        self._thread.shutdown()
        self.endpoint.close()


class _Sampling:
    """Makes one call of `AgentSampler.sample`."""

    def __init__(
        self, sampler: AgentSampler, engine: Engine | Relay, prompts: Sequence[Prompt], params: SamplingParams
    ) -> None:
        self.sampler, self.prompts, self.size, self.ended = sampler, prompts, params.group_size, 0
        self.params = replace(params, group_size=1)
        self.batcher = Batcher(engine, self.params, most_waiting=NO_LIMIT, wait_s=WAIT_S, cache_tokens=CACHE_TOKENS)
        self.kind = sampler.kind(engine)
        self.begun = [self._begin_episode(place) for place in range(len(prompts) * self.size)]

    def _begin_episode(self, place: int) -> tuple[Episode, dict[str, Any]]:
        """Returns an episode, and what its agent is called with."""
        number, sample = divmod(place, self.size)
        prompt, endpoint = self.prompts[number], self.sampler.endpoint
        sample += prompt.first_sample
        episode = self.kind(prompt, sample, self.batcher, self.params, self.sampler.temperature)
        episode.home = place
        address = {"base_url": endpoint.open(episode), "api_key": endpoint.key}
        values = {**prompt.columns, "prompt": prompt.text, **address}
        return episode, {"function": 0, "given": values, "seed": seeds(self.params, prompt.prompt_id, sample)[1]}

    def run(self, agents: WorkerPool) -> list[RolloutGroup]:
        """Returns the groups, once every agent has returned or failed."""
        size = self.size
        replies = agents.run([request for _, request in self.begun], on_reply=self._end)
        for place, reply in enumerate(replies):
            if reply is not None and reply.get("kind") == "died":  # perhaps by somebody's hand: the same once more
                self.begun[place] = self._begin_episode(place)
                [replies[place]] = agents.run([self.begun[place][1]])
        episodes = [episode for episode, _ in self.begun]
        completions = [episode.finish(reply or {}) for episode, reply in zip(episodes, replies, strict=True)]
        return [RolloutGroup(prompt, completions[i * size : (i + 1) * size]) for i, prompt in enumerate(self.prompts)]

    def check(self) -> None:
        """Raises what has ended the decoding. The agents were told of it, and what they make of that says nothing."""
        if self.batcher.error is not None:
            raise self.batcher.error

    def _end(self, place: int) -> None:
        self.begun[place][0].end()
        self.ended += 1
