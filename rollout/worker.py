"""A rollout worker: one engine in a Ray actor, and how it takes a publication over."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.lora import Adapter
from policies.policy import Policy
from rollout.depth import CostTable
from rollout.engine import Engine, RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.publication.digests import Held
from rollout.publication.message import Message, unpack, with_differences
from rollout.sampling import SamplingParams


class Receiver:
    """Takes publications over: an engine, and the weights under its adapters."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._under: dict[str, Tensor] = {}

    def take(self, message: Message) -> Held:
        """Loads a publication; returns the digests of what the engine decodes with then."""
        engine = self.engine
        if message.since is not None and engine.version != message.since:
            raise RolloutError(
                f"a worker holds policy version {engine.version}, and what it got follows version {message.since}"
            )
        engine.version = -1  # while it is neither the old one nor the new one
        weights = unpack(message.tensors)
        if message.since is None:
            self._under = {name: weights[name].clone() for name in message.adapters}
        else:
            own = engine.policy.weights()
            try:
                weights = own | weights | with_differences(own, message.deltas)
            except ValueError:  # what it holds is not what the differences follow
                return {}
        for name, (factors, scale, experts, transposed) in message.adapters.items():
            adapter = Adapter(**unpack(factors), scale=scale, experts=experts, transposed=transposed)
            weights[name] = adapter.merge(self._under[name])
        engine.publish(weights, message.version)
        return engine.held()


class Worker:
    """Samples shards, only with weights that it has confirmed. The pool makes it a Ray actor."""

    def __init__(self, skeleton: dict[str, bytes], held: str, dtype: str, device: str, threads: int) -> None:
        """`held`: precision of its copy of the policy and of the published weights; `dtype`: precision of decoding."""
        torch.set_num_threads(threads)
        policy = Policy.from_skeleton(skeleton, getattr(torch, held)).to(device)
        self.engine = Engine(policy, getattr(torch, dtype))
        self.engine.version = -1
        self.receiver = Receiver(self.engine)

    def publish(self, message: Message) -> Held:
        """Take weights over; returns the digests of what the engine holds from now on (contract 5)."""
        return self.receiver.take(message)

    def measure_costs(self, rows: int) -> CostTable:
        return self.engine.measure_costs(min(rows, self.engine.max_rows))

    def sample(
        self, prompts: list[Prompt], params: SamplingParams, version: int, costs: CostTable | None = None
    ) -> list[RolloutGroup]:
        if self.engine.version != version:
            raise RolloutError(
                f"a worker holds policy version {self.engine.version}, but version {version} was asked for"
            )
        self.engine.costs = costs or self.engine.costs
        return self.engine.sample(prompts, params)
