"""Several processes that learn together: rank 0 runs the run, the others compute their share of every gradient.

Rank 0 says what comes next; the others (grpo/follower.py) do the same call on their own copy of the learner. Inside
it `share` cuts the rows, and the sums below make gradients, metrics and counts those of the whole batch, so that
every rank takes the same optimizer step. Started by `accelerate launch -m grpo train ...`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.learner.batch import PackedRow
from grpo.run.stop import Stopped

if TYPE_CHECKING:
    from grpo.learner.experts import Balancer
    from grpo.learner.learner import Learner
    from policies.policy import Policy

TIMEOUT_S = 1800.0  # how long a rank waits for another inside a step; waiting for the next step has no limit
POLL_S = 0.02  # how often a waiting rank asks for the next step


class RankFailed(RuntimeError):
    """Another process of the run has failed; the message is its own."""


class Ranks:
    """One process alone: every row is its own, every sum is there already."""

    rank, size = 0, 1

    def share(self, rows: Sequence[PackedRow]) -> Sequence[PackedRow]:
        """The rows of this rank."""
        return rows

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients over the ranks, in place. A parameter without one on every rank stays without."""

    def sum_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sum every entry over the ranks that have it; what ends in `_max` is their maximum."""
        return dict(sums)

    def sum_balance(self, balancer: Balancer) -> None:
        """Make what a step has counted of the experts that of all ranks, in place."""

    def gather(self, values_N: Sequence[Tensor]) -> Tensor:
        """One vector of the values [N] of all ranks."""
        return torch.cat(list(values_N))

    # ---- what rank 0 says to the others ---------------------------------------------------------------------------

    def begin(self, kind: str, policy: Policy) -> None:
        """The others build the learner of this `kind` (sft, grpo) around a copy of `policy`."""

    def hand_over(self, learner: Learner) -> None:
        """The others take over the state of `learner`."""

    def call(self, learner: Learner, name: str, *arguments: Any, own: tuple[Any, ...] = ()) -> Any:
        """`learner.name(*arguments)` on every rank; `own` (a progress bar) are further arguments on this one."""
        return getattr(learner, name)(*arguments, *own)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around everything that rank 0 does: its end, good or bad, ends the others."""
        yield


ALONE = Ranks()


def join(cpu: bool) -> Ranks:
    """This process among those that accelerate has launched; ALONE where it has not.

    Raises ValueError where several were asked for and `accelerate launch --cpu` has started one.
    """
    if "WORLD_SIZE" not in os.environ and {"MASTER_ADDR", "ACCELERATE_USE_CPU"} <= os.environ.keys():
        raise ValueError(
            "accelerate launch --cpu starts one process whatever --num_processes says; for several on CPUs use "
            "accelerate launch --multi_gpu --num_processes N -m grpo ... --device cpu"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens on the interface of the host's name
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=timedelta(seconds=TIMEOUT_S))
    if state.process_index == 0:
        print(f"learning in {state.num_processes} processes on {state.device.type}", flush=True)
    return Team(state.process_index, state.num_processes, state.device)


class Team(Ranks):
    """One of several processes with a torch.distributed group."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._store = dist.distributed_c10d._get_default_store()
        self._messages = 0

    def share(self, rows: Sequence[PackedRow]) -> Sequence[PackedRow]:
        return sorted(rows, key=lambda row: -row.length)[self.rank :: self.size]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        with self._together():
            dist.all_reduce(there)
            for parameter, ranks in zip(parameters, there.tolist(), strict=True):
                if ranks:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    dist.all_reduce(parameter.grad)

    def sum_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        total: dict[str, float] = {}
        for part in self._gather(dict(sums)):
            for name, value in part.items():
                former = total.get(name, 0.0)
                total[name] = max(former, value) if name.endswith("_max") else former + value
        return total

    def sum_balance(self, balancer: Balancer) -> None:
        if not balancer.routers:
            return
        with self._together():
            dist.all_reduce(balancer.counts)
            dist.all_reduce(balancer.entropies)
        balancer.sums = Counter(self.sum_metrics(balancer.sums))

    def gather(self, values_N: Sequence[Tensor]) -> Tensor:
        own = torch.cat([torch.zeros(0, device=self.device), *values_N])
        return torch.cat([part.to(self.device) for part in self._gather(own.cpu())])

    def _gather(self, own: Any) -> list[Any]:
        parts = [None] * self.size
        with self._together():
            dist.all_gather_object(parts, own)
        return parts

    # ---- rank 0 ---------------------------------------------------------------------------------------------------

    def begin(self, kind: str, policy: Policy) -> None:
        dtype = str(next(policy.parameters()).dtype).removeprefix("torch.")
        self._send("begin", kind, policy.skeleton(), dtype)
        self.broadcast(policy.weights())

    def hand_over(self, learner: Learner) -> None:
        tensors, state = learner.state()
        self._send("state", state, list(tensors))
        for mapping in tensors.values():
            self.broadcast(mapping)

    def call(self, learner: Learner, name: str, *arguments: Any, own: tuple[Any, ...] = ()) -> Any:
        self._send("call", name, arguments)
        return getattr(learner, name)(*arguments, *own)

    @contextmanager
    def leading(self) -> Iterator[None]:
        try:
            yield
            self._send("end", None)
        except Stopped as error:
            self._send("end", str(error))
            raise
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise

    def _send(self, *message: Any) -> None:
        """Announced in the store, where the others wait without a limit and see a failure; then broadcast."""
        self._store.set(f"message/{self._messages}", "")
        self._messages += 1
        with self._together():
            dist.broadcast_object_list([message], src=0)

    # ---- the others -----------------------------------------------------------------------------------------------

    def receive(self) -> tuple[Any, ...]:
        """The next message of rank 0. Raises RankFailed if there will be none."""
        while not self._told(f"message/{self._messages}"):  # Store.wait would warn at each of its timeouts
            self._raise_failure()
            time.sleep(POLL_S)
        self._messages += 1
        message: list[Any] = [None]
        with self._together():
            dist.broadcast_object_list(message, src=0)
        return message[0]

    # ---- both -----------------------------------------------------------------------------------------------------

    def broadcast(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Named tensors of rank 0, on every rank."""
        described = [[(name, list(t.shape), t.dtype) for name, t in tensors.items()] if tensors is not None else None]
        with self._together():
            dist.broadcast_object_list(described, src=0)
            result = {}
            for name, shape, dtype in described[0] or []:
                if tensors is None:
                    tensor = torch.empty(shape, dtype=dtype, device=self.device)
                else:
                    tensor = tensors[name].detach().to(self.device).contiguous()
                dist.broadcast(tensor, src=0)
                result[name] = tensor
        return result

    def fail(self, message: str) -> None:
        """Leave a last word for the others, whose own calls end with this process."""
        try:
            if not self._store.check(["failed"]):
                self._store.set("failed", f"rank {self.rank} failed: {message}")
        except dist.DistError:
            return  # the store is gone, and with it every rank that could read

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Inside, a rank that is gone is an error that says what ended it."""
        try:
            yield
        except RuntimeError as error:
            self._raise_failure()
            raise RankFailed(f"another process of this run is gone or does not answer: {error}") from error

    def _raise_failure(self) -> None:
        if self._told("failed"):
            raise RankFailed(self._store.get("failed").decode())

    def _told(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except dist.DistError as error:
            raise RankFailed("rank 0 is gone without a word; see what it has printed") from error
