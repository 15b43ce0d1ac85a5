"""A rollout worker: one engine in a Ray actor, how it takes a publication over, and how it gives it to a new worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from policies import devices
from policies.lora import Adapter
from policies.policy import Policy
from policies.synced_weights import SyncedWeights
from rollout.cost_table import CostTable, Workload
from rollout.decoding.engine import Engine
from rollout.faults import Kind, RolloutError, why_died
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.places import here
from rollout.requests.desk import Answering, Desk
from rollout.sampling import PLAIN, Copies, SamplingParams
from rollout.weight_sync.checksums import Held
from rollout.weight_sync.message import PART_BYTES, Message, everything, unpack

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class Receiver:
    """Takes publications over: an engine, and what is under its merged weights: the plain ones, and A and B."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._under: dict[str, Tensor] = {}
        self._adapters: dict[str, Adapter] = {}
        self._taking: int | None = None  # the version of which parts are yet to come
        self._device = engine.policy.device

    def take_message(self, message: Message) -> Held:
        """Loads a part of a publication. After the last one it returns the digests of what the engine decodes with
        then, and nothing before, nor where what it holds is not what the publication follows."""
        engine, policy = self.engine, self.engine.policy
        if message.first:
            if message.since is None:
                self._under, self._adapters, policy.draft_ids = {}, {}, None
            elif engine.version != message.since:
                raise RolloutError(
                    f"a worker holds policy version {engine.version}, and what it got follows version {message.since}"
                )
            engine.version = -1  # while it is neither the old one nor the new one
            policy.to(self._device)  # it may have slept
            self._taking = message.version
        elif self._taking != message.version:
            return {}
        self._taking = None
        weights = unpack(message.tensors)
        for name, (factors, scale, experts, transposed) in message.adapters.items():
            copies = {factor: tensor.clone() for factor, tensor in unpack(factors).items()}
            self._adapters[name] = Adapter(**copies, scale=scale, experts=experts, transposed=transposed)
            if name in weights:
                self._under[name] = weights[name].clone()
            weights[name] = self._adapters[name].merge(self._under[name])
        policy.load_weights(policy.weights() | weights)
        if not message.last:
            self._taking = message.version
            return {}
        engine.sync_weights(policy.weights(), message.version)
        return engine.held()

    def messages(self, part_bytes: int = PART_BYTES) -> Iterator[Message]:
        """All that it holds, for a new worker."""
        weights = SyncedWeights(self.engine.policy.weights() | self._under, self._adapters)
        return everything(weights, self.engine.version, part_bytes)


class Worker:
    """Samples shards, only with weights that it has confirmed. The pool makes it a Ray actor."""

    def __init__(
        self, skeleton: dict[str, bytes], held: str, dtype: str, device: str, threads: int, copies: Copies = PLAIN
    ) -> None:
        """Makes a copy of the policy. `held`: precision of its copy of the policy and of the published weights;
        `dtype`: precision of decoding, in which `copies` may have fewer bits. `device` is `auto` or `cpu`."""
        torch.set_num_threads(threads)
        policy = Policy.from_skeleton(skeleton, getattr(torch, held)).to(devices.device_of(device))
        self.engine = Engine(policy, getattr(torch, dtype), copies=copies)
        self.engine.version = -1
        self.receiver = Receiver(self.engine)
        self.desk = Desk(self.engine)

    def ready(self) -> dict[str, Any]:
        """Answers as soon as the worker can be given something to do: where it is."""
        return here()

    def sync_weights(self, message: Message) -> Held:
        """Take weights over; returns the digests of what the engine holds from now on (contract 5)."""
        self.desk.close()
        return self.receiver.take_message(message)

    def give(self, worker: ActorHandle) -> tuple[Held | tuple[Kind, str], int]:
        """Give another worker the weights of this one, in parts through Ray's store. Returns the digests of what it
        holds then, or why it is lost, and the bytes that were sent."""
        import ray

        held: Held = {}
        sent = 0
        try:
            for message in self.receiver.messages():
                sent += message.bytes
                held = ray.get(worker.sync_weights.remote(message))
        except ray.exceptions.RayActorError as error:
            return why_died(error), sent
        return held, sent

    def sleep(self) -> None:
        """Leave the GPU to the learner until the next publication. The weights wait in the host's memory."""
        self.desk.close()
        self.engine.forget()
        self.engine.policy.to("cpu")
        devices.empty_cache()

    def measure_costs(self, work: Workload) -> CostTable:
        return self.engine.measure_costs(work)

    def sample(
        self, prompts: list[Prompt], params: SamplingParams, version: int, costs: CostTable | None = None
    ) -> list[RolloutGroup]:
        self._check(version)
        self.engine.costs = costs or self.engine.costs
        return self.engine.sample(prompts, params)

    def answer(
        self, answering: Answering, new: dict[int, tuple[Prompt, SamplingParams]], gone: list[int]
    ) -> dict[int, Completion]:
        """Answer requests as they come; see `Desk`."""
        self._check(answering.version)
        return self.desk.answer(answering, new, gone)

    def _check(self, version: int) -> None:
        """Raises RolloutError where it may not sample with what it holds."""
        if self.engine.version != version:
            raise RolloutError(
                f"a worker holds policy version {self.engine.version}, but version {version} was asked for"
            )
        if not self.engine.derived:
            raise RolloutError("a worker sleeps until the next weight sync")
