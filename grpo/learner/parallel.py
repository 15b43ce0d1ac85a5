"""Several processes that learn together. Every one runs the same loop; rank 0 alone samples, scores and writes files.

Rank 0 tells the others what it drew (`from_first`). Each reads its share of the rows, and FSDP averages the gradients
(policies/sharding.py). The loss is multiplied by the number of readers, so the average is the gradient of the whole
batch. The ranks of one tensor-parallel group read the same rows.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from grpo.learner.batch import PackedRow
from grpo.run.stop import GivenUp, Stopped

TIMEOUT = timedelta(minutes=30)  # how long a rank waits for another inside a step
PATIENCE = timedelta(days=30)  # how long it waits for what rank 0 samples, which has limits of its own
T = TypeVar("T")


class RankFailed(RuntimeError):
    """Another process of the run has failed; the message is its own."""


class Ranks:
    """The processes of a run, seen from one. Without `layout` it is alone: all rows are its own, all sums are there."""

    def __init__(
        self, layout: DistributedConfig | None = None, rank: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        tensor = layout.tp_size if layout else 1
        # Which share of the rows this process reads, and how many shares there are.
        self.reader, self.readers = rank // tensor, layout.dp_size if layout else 1
        self.size, self._counts = self.readers * tensor, rank % tensor == 0
        self.ended_together = self.size == 1  # an error has reached every rank at once: together they can still save
        if self.size > 1:
            self._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
            self._store = dist.distributed_c10d._get_default_store()
            self._store.set(f"process/{rank}", json.dumps([socket.gethostname(), os.getpid()]))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Sequence[PackedRow], reader: int | None = None) -> Sequence[PackedRow]:
        """The rows of this reader, or of another one."""
        if self.size == 1:
            return rows
        return sorted(rows, key=lambda row: -row.length)[self.reader if reader is None else reader :: self.readers]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. If it raises there, every rank raises."""
        if self.size == 1:
            return make()
        told: list[Any] = [None]
        if self.first:
            try:
                told = [(make(), "", "")]
            except BaseException as error:
                dist.broadcast_object_list([(None, type(error).__name__, str(error))], group=self._waiting)
                self.ended_together = True
                raise
        dist.broadcast_object_list(told, group=self._waiting)
        made, kind, message = told[0]
        self.ended_together = bool(kind)
        if kind == "GivenUp":
            raise GivenUp(int(message))
        if kind:
            raise RankFailed(f"rank 0 failed: {kind}: {message}")
        return made

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients that FSDP does not, in place. One that no rank has stays absent."""
        plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.size == 1 or not plain:
            return
        there = torch.tensor([float(p.grad is not None) for p in plain], device=self.device)
        dist.all_reduce(there)
        for parameter, ranks in zip(plain, there.tolist(), strict=True):
            if ranks:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size  # the copies of a tensor group are equal

    def sum_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sum every entry over the readers that have it; what ends in `_max` is their maximum."""
        total: dict[str, float] = {}
        for part in self._gather(dict(sums)):
            for name, value in part.items():
                former = total.get(name, 0.0)
                total[name] = max(former, value) if name.endswith("_max") else former + value
        return total

    def sum_tensors(self, *tensors: Tensor) -> None:
        """Sum each over the readers, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor if self._counts else tensor.zero_())

    def union(self, own: dict[int, T]) -> dict[int, T]:
        """The entries of all readers."""
        return {key: value for part in self._gather(own) for key, value in part.items()}

    def gather(self, values_N: Sequence[Tensor]) -> Tensor:
        """One vector of the values [N] of all readers."""
        own = torch.cat([torch.zeros(0, device=self.device), *values_N])
        return torch.cat([part.to(self.device) for part in self._gather(own.cpu())])

    def _gather(self, own: T) -> list[T]:
        """One entry of each reader."""
        if self.size == 1:
            return [own]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own if self._counts else None)
        return [part for part in parts if part is not None]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around the run: a rank that fails leaves its message, and the others end with it."""
        try:
            yield
        except BaseException as error:
            if self.size == 1 or isinstance(error, RankFailed | Stopped):
                raise
            said = isinstance(error, dist.DistError) or any(
                word in str(error) for word in ("onnection", "gloo", "NCCL")
            )
            lost = isinstance(error, RuntimeError) and said  # another rank has ended
            try:
                if not lost and not self._store.check(["failed"]):
                    self._store.set("failed", f"rank {self.rank} failed: {type(error).__name__}: {error}")
                    raise
                words = self._store.get("failed").decode() if self._store.check(["failed"]) else self._who_is_gone()
            except dist.DistError:
                words = "rank 0 is gone without a word; see what it has printed"
            raise RankFailed(words) from error

    def _who_is_gone(self) -> str:
        """A process that was killed says nothing. On this machine its number tells."""
        gone = []
        for rank in range(self.size):
            host, pid = json.loads(self._store.get(f"process/{rank}"))
            lives = psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            if host == socket.gethostname() and not lives:
                gone.append(f"rank {rank} (process {pid})")
        return f"{' and '.join(gone) or 'a rank on another machine'} is gone without a word"


ALONE = Ranks()


def join(cpu: bool, options: ParallelOptions) -> Ranks:
    """This process among those that accelerate, torchrun or Ray Train has launched; ALONE where there are no others.

    Raises ValueError where `learner.parallel` does not fit their number, and where several were asked for and
    `accelerate launch --cpu` has started one.
    """
    if "WORLD_SIZE" not in os.environ and {"MASTER_ADDR", "ACCELERATE_USE_CPU"} <= os.environ.keys():
        raise ValueError(
            "accelerate launch --cpu starts one process whatever --num_processes says; for several on CPUs use "
            "accelerate launch --multi_gpu --num_processes N -m grpo ... --device cpu"
        )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    fsdp = options.shares(size)
    if size == 1:
        return ALONE
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
        dp_replicate_size=options.replicate,
        fsdp_cpu_offload=options.fsdp_cpu_offload,
        ep_implementation="all_to_all",
    )
    return Ranks(layout, state.process_index, state.device)


def refuse_layout(
    options: ParallelOptions, shape: PretrainedConfig, lora: LoraOptions | None, itemsize: int = 4
) -> None:
    """Raises ValueError for what this model cannot do in such a layout, before it is loaded."""
    tensor, expert = options.tensor, options.expert
    plan = dict(shape.base_model_tp_plan or {})
    experts, width = getattr(shape, "n_routed_experts", None), getattr(shape, "moe_intermediate_size", None)
    if tensor > 1 and not plan:
        raise ValueError(
            f"learner.parallel.tensor={tensor}: transformers has no tensor-parallel plan for a model of type "
            f"{shape.model_type!r}; use learner.parallel.fsdp"
        )
    if tensor > 1 and "layers.*.self_attn.k_proj" in plan and shape.num_key_value_heads % tensor:
        raise ValueError(
            f"learner.parallel.tensor={tensor} does not divide this model's {shape.num_key_value_heads} key/value heads"
        )
    if tensor > 1 and width and width % tensor:
        raise ValueError(f"learner.parallel.tensor={tensor} does not divide the width of an expert, {width}")
    if tensor > 1 and width and width // tensor * itemsize % 16:
        raise ValueError(
            f"learner.parallel.tensor={tensor} leaves {width // tensor} numbers of an expert's width of {width} to each"
            f" rank, and its products need a multiple of {16 // itemsize}; use a smaller one, or expert"
        )
    if expert > 1 and not (experts and shape.base_model_ep_plan):
        raise ValueError(f"learner.parallel.expert={expert}: this model has no routed experts; set it to 1")
    if experts and experts % expert:
        raise ValueError(f"learner.parallel.expert={expert} does not divide this model's {experts} routed experts")
    split = {"experts"} if expert > 1 else set()
    if tensor > 1:
        split |= {"lm_head"} | {"experts" if ".experts" in key else key.rsplit(".", 1)[-1] for key in plan}
    if lora and (wrong := sorted(split if lora.targets is None else split.intersection(lora.targets))):
        raise ValueError(
            f"lora.targets: learner.parallel.tensor={tensor}, expert={expert} split {', '.join(wrong)} over ranks, and "
            "peft adapts whole weights alone; name other targets, or spread the weights by learner.parallel.fsdp"
        )
