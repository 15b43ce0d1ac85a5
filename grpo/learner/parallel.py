"""Several processes that learn together. Every one runs the same loop; rank 0 alone samples, scores and writes files.

Rank 0 tells the others what it drew (`from_first`). Each reads its share of the rows, and FSDP averages the gradients
(policies/sharding.py). The loss is multiplied by the number of readers, so the average is the gradient of the whole
batch. The ranks of one tensor-parallel group read the same rows.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig
from transformers.distributed import DistributedConfig

from grpo.config.learner import LoraOptions, ParallelOptions
from grpo.run.stop import Stopped, ignore_signals
from policies.sharding import everyone, routed_experts

TIMEOUT = timedelta(minutes=30)  # how long a rank waits for another inside a step
PATIENCE = timedelta(days=30)  # how long it waits for what rank 0 samples, which has limits of its own
T = TypeVar("T")
Key = TypeVar("Key", int, tuple[int, int])


class RankFailed(RuntimeError):
    """Another process of the run has failed; the message is its own."""

    everywhere = True  # every rank of the run raises at this point, and together they can still save


class Ranks:
    """The processes of a run, seen from one. Without `layout` it is alone: all rows are its own, all sums are there."""

    def __init__(
        self, layout: DistributedConfig | None = None, rank: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.layout, self.rank, self.device, self.first = layout, rank, device, rank == 0
        tensor = layout.tp_size if layout else 1
        # Which share of the rows this process reads, and how many shares there are.
        self.reader, self.readers = rank // tensor, layout.dp_size if layout else 1
        self.size, self._counts = self.readers * tensor, rank % tensor == 0
        if self.size > 1:
            self._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
            self._store = dist.distributed_c10d._get_default_store()
            self._processes = everyone((socket.gethostname(), os.getpid()))
            self._heard = ""  # what a rank that failed has said
            self._stopped = 0  # the signal that rank 0 was stopped by

    def share(self, rows: Sequence[Any], reader: int | None = None) -> Sequence[Any]:
        """The rows or trees of this reader, or of another one."""
        if self.size == 1:
            return rows
        return sorted(rows, key=lambda row: -row.length)[self.reader if reader is None else reader :: self.readers]

    def from_first(self, make: Callable[[], T]) -> T:
        """Gives what `make` returns on rank 0, on every rank. If it raises there, every rank raises."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]  # what was made, and the error of the others where it was not
        failure: Any = None
        if self.first:
            try:
                told[0] = make()
            except BaseException as error:
                failure, words = error, f"rank 0 failed: {type(error).__name__}: {error}"
                told[1] = error if isinstance(error, Stopped) else RankFailed(words)
        dist.broadcast_object_list(told, group=self._waiting)
        if ended := failure or told[1]:
            ended.everywhere = True
            raise ended
        return told[0]

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients that FSDP does not, in place. All ranks have them for the same parameters."""
        for tensor in parameters if self.size > 1 else ():
            if tensor.grad is not None and not isinstance(tensor, DTensor):
                dist.all_reduce(tensor.grad)
                tensor.grad /= self.size  # the copies of a tensor group are equal

    def sum_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sum every entry over the readers that have it; what ends in `_max` is their maximum."""
        total: dict[str, float] = {}
        for part in self.gather(dict(sums)):
            for name, value in part.items():
                former = total.get(name, 0.0)
                total[name] = max(former, value) if name.endswith("_max") else former + value
        return total

    def sum_tensors(self, *tensors: Tensor) -> None:
        """Sum each over the readers, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor if self._counts else tensor.zero_())

    def union(self, local: dict[Key, T]) -> dict[Key, T]:
        """The entries of all readers."""
        return {key: value for part in self.gather(local) for key, value in part.items()}

    def gather(self, local: T) -> list[T]:
        """One entry of each reader. Tensors in it must be in the host's memory."""
        parts = [local] if self.size == 1 else everyone(local if self._counts else None)
        return [part for part in parts if part is not None]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around the run: a rank that fails leaves its message, and the others end with it. So do they where rank 0 was
        asked to stop while they did something together."""
        over, listener = threading.Event(), threading.Thread(target=lambda: self._listen(over), daemon=True)
        try:
            if self.size > 1:
                listener.start()
            yield
        except BaseException as error:
            if self.size == 1 or getattr(error, "everywhere", False):
                raise
            if isinstance(error, dist.DistError) or (
                type(error) is RuntimeError and re.search("onnection|gloo|NCCL", str(error))
            ):  # another rank has ended, and what it said may be on its way
                listener.join(2)
                if self._stopped:
                    raise Stopped(self._heard, self._stopped) from None
                raise RankFailed(self._heard or self._tell_who_is_gone()) from error
            words = f"rank {self.rank} failed: {type(error).__name__}: {error}"
            with suppress(dist.DistError):
                if isinstance(error, Stopped):
                    words = str(error)
                    self._store.set("stopped", str(error.number))
                self._store.compare_set("failed", "", words)
                if self.first:  # the store ends with it
                    self._store.wait([f"heard/{rank}" for rank in range(1, self.size)], timedelta(seconds=10))
            raise
        finally:
            over.set()

    def _listen(self, over: threading.Event) -> None:
        """Keep the message of a rank that fails: it is in the store, which ends with rank 0."""
        with suppress(dist.DistError):
            store = self._store.clone()  # the other one may be waiting
            while not over.wait(0.5):
                if store.check(["failed"]):
                    self._stopped = int(store.get("stopped")) if store.check(["stopped"]) else 0
                    self._heard = store.get("failed").decode()
                    return store.set(f"heard/{self.rank}", "")

    def _tell_who_is_gone(self) -> str:
        """A process that was killed says nothing. On this machine its number tells. The rank that looks first tells the
        others, which would take it for gone, too, once it has ended."""
        gone = {
            rank: f"rank {rank} (process {pid})"
            for rank, (host, pid) in enumerate(self._processes)
            if host == socket.gethostname()
            and not (psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        }
        who = " and ".join(gone.values()) or "a rank on another machine"
        words = f"{who} is gone without a word; see what it has printed"
        with suppress(dist.DistError):
            words = self._store.compare_set("failed", "", words).decode()
            self._store.set(f"heard/{self.rank}", "")
            if self.first:  # the store ends with it
                others = [f"heard/{rank}" for rank in range(1, self.size) if rank not in gone]
                self._store.wait(others, timedelta(seconds=10))
        return words


ONE_PROCESS = Ranks()


def refuse_processes(cpu: bool, options: ParallelOptions, size: int = 0) -> None:
    """Raises ValueError where `learner.parallel` does not fit so many processes (0: those that were launched, if any),
    and where several were asked for and `accelerate launch --cpu` has started one."""
    if "WORLD_SIZE" not in os.environ and {"MASTER_ADDR", "ACCELERATE_USE_CPU"} <= os.environ.keys():
        raise ValueError(
            "accelerate launch --cpu starts one process whatever --num_processes says; for several on CPUs use "
            "accelerate launch --multi_gpu --num_processes N -m grpo ... --device cpu"
        )
    if size := size or int(os.environ.get("WORLD_SIZE", "0")):
        options.shares(size)


def join(cpu: bool, options: ParallelOptions) -> Ranks:
    """This process among those that accelerate, torchrun or Ray Train has launched; ONE_PROCESS if there are no others.

    Raises ValueError as `refuse_processes`, and for a `learner.parallel` of several where nobody has launched any.
    """
    refuse_processes(cpu, options)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    fsdp, copies = options.shares(size)
    if size == 1:
        return ONE_PROCESS
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens on the interface of the host's name
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=TIMEOUT)
    if state.process_index == 0:
        print(f"learning in {state.num_processes} processes on {state.device.type}", flush=True)
    layout = DistributedConfig(
        fsdp_size=fsdp,
        tp_size=options.tensor,
        ep_size=options.expert,
        dp_replicate_size=copies,
        ep_implementation="all_to_all",
    )
    return Ranks(layout, state.process_index, state.device)


@contextmanager
def joined(cpu: bool, options: ParallelOptions) -> Iterator[Ranks]:
    """Joins the other processes (see `join`). Only rank 0 handles signals, and a rank that fails tells the others."""
    ranks = join(cpu, options)
    if not ranks.first:
        ignore_signals()
    with ranks.together():
        yield ranks


def refuse_layout(
    options: ParallelOptions, shape: PretrainedConfig, lora: LoraOptions | None, itemsize: int = 4
) -> None:
    """Raises ValueError for what this model cannot do in such a layout, before it is loaded."""
    tensor, expert = options.tensor, options.expert
    plan = shape.base_model_tp_plan or {} if tensor > 1 else {}
    experts = routed_experts(shape)
    width = getattr(shape, "moe_intermediate_size", None) or 0 if tensor > 1 else 0
    heads = shape.num_key_value_heads if "layers.*.self_attn.k_proj" in plan else 0
    part, unit = width // tensor, 16 // itemsize  # of numbers, in which the products of experts take them
    adapted = {key for key in plan if lora and (lora.targets is None or key.rsplit(".", 1)[-1] in lora.targets)}
    odd = sorted({plan[key] for key in adapted} - {"colwise", "rowwise", "packed_colwise", "moe_tp_experts"})
    for key, refused, words in (
        ("expert", expert > 1 and not experts, "needs a model with routed experts"),
        (
            "expert",
            expert > 1 and not shape.base_model_ep_plan,
            f"has no plan in transformers for a model of type {shape.model_type!r}",
        ),
        ("expert", experts % expert, f"does not divide this model's {experts} routed experts"),
        ("tensor", tensor > 1 and not plan, f"has no plan in transformers for a model of type {shape.model_type!r}"),
        ("tensor", heads % tensor, f"does not divide this model's {heads} key/value heads"),
        ("tensor", width % tensor, f"does not divide the width of an expert, {width}"),
        (
            "tensor",
            part % unit,
            f"leaves each rank {part} of an expert's {width} units, which must be a multiple of {unit}",
        ),
        ("tensor", odd, f"splits some of lora.targets in a way that adapters do not know, {odd}"),
    ):
        if refused:
            number = getattr(options, key)
            raise ValueError(f"learner.parallel.{key}={number} {words}; use another number, or learner.parallel.fsdp")
