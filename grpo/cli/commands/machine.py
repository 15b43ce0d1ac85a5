"""The memory and disk of this machine, or of devices that are only named, compared with the most that a run needs, and
what would make it fit."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from grpo.cli.commands.memory_table import SFT_STAGE, DeviceMemory
from grpo.config.mtp import MtpConfig
from grpo.config.run import LearningConfig, RunConfig, TrainConfig
from grpo.task.plan import Plan
from grpo.task.table import contradictions

GIB = 2**30
PROCESS = 0.4 * GIB  # what torch itself needs in each process
SPARE = 0.2  # the share of memory that stays free: for fragments, and for what is estimated too low
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
Changes = dict[str, Any]  # {"learner.gradient_checkpointing": True}
SMALLEST = {"learner.tokens_per_micro_batch": 512, "mtp.tokens_per_update": 128, "rollout.max_completion_tokens": 64}
MOST = 3  # changes that are named as enough by themselves
LEAST_GAIN = 0.99  # of what is needed: a change that leaves more is not named
MOST_RANKS = 64


class Verdict(NamedTuple):
    line: str
    fits: bool


class Memory(NamedTuple):
    """One device has this memory, or a machine without devices that have memory of their own."""

    name: str
    total: float  # bytes
    free: float
    gpus: float = 0  # how many such devices; see memory_table.on_devices

    @classmethod
    def there(cls, device: torch.device, gib: float | None) -> Memory:
        """Looks at the devices at hand, or takes as many as are asked for of `gib` GiB each."""
        if gib:
            return cls(f"memory of a device of {gib:g} GiB", gib * GIB, gib * GIB, float("inf"))
        module = torch.get_device_module(device)
        if not hasattr(module, "mem_get_info"):  # a CPU, or an accelerator that shares its memory, as Apple's
            return cls("memory", *main_memory())
        free, total = module.mem_get_info(device)
        gpus = float("inf") if "RAY_ADDRESS" in os.environ else torch.accelerator.device_count()
        return cls(f"memory of {module.get_device_name(device)}", total, free, gpus)

    def needed(self, devices: Sequence[DeviceMemory]) -> dict[str, float]:
        """Returns the bytes that each part of the run needs, in order. On CPUs all processes share the memory."""
        if self.gpus:
            on_gpus = [it for it in devices if not it.on_host]
            return {f"{phase} ({it.name})": size for it in on_gpus for phase, size in it.phases.items()}
        needed: dict[str, float] = {}
        for warm in (True, False):  # one after the other
            for it in devices:
                for phase, size in it.phases.items() if (it.name == SFT_STAGE) == warm else ():
                    part = f"{phase} in the SFT stage" if warm else phase
                    needed[part] = needed.get(part, 0.0) + it.count * (size + PROCESS)
        return needed

    def used(self, devices: Sequence[DeviceMemory]) -> float:
        """Returns the share of what may be used that `devices` need; above 1 they do not fit."""
        return max(self.needed(devices).values()) / (self.total * (1 - SPARE))


def verdicts(
    devices: Sequence[DeviceMemory], memory: Memory, folder: Path, disk: float, less: Callable[[], str], less_disk: str
) -> Iterator[Verdict]:
    """Yields what the run needs of memory and of disk, what there is, and whether it fits, or at which part of the run
    it will not. `devices` are those of `MemoryOfRun`; `disk` bytes will be written into `folder`. `less` is asked what
    would make it fit. Main memory beside that of devices is compared only where they are at hand."""
    yield _verdict(memory.name, memory.needed(devices), memory.total, memory.free, less, SPARE)
    if memory.gpus:
        yield _main_memory(devices, at_hand="device of" not in memory.name)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    room = shutil.disk_usage(there).free
    yield _verdict(f"disk at {there}", {"": disk}, room, room, lambda: less_disk)


def _main_memory(devices: Sequence[DeviceMemory], at_hand: bool) -> Verdict:
    """Returns what the processes of a run on GPUs hold in main memory, if all of them are on one machine."""
    needed = sum(it.count * ((it.peak if it.on_host else it.host) + PROCESS) for it in devices if it.name != SFT_STAGE)
    if at_hand and "RAY_ADDRESS" not in os.environ:
        return _verdict("main memory", {"loading": needed}, *main_memory(), lambda: "use more machines, or more memory")
    each = ", ".join(f"{it.name} {it.host / GIB:,.1f}" for it in devices if it.host)
    return Verdict(f"main memory: about {needed / GIB:,.1f} GiB while loading, over all machines ({each})", True)


def main_memory() -> tuple[float, float]:
    """Returns (total bytes, free bytes), within the limit of a container."""
    memory = psutil.virtual_memory()
    texts = [path.read_text().strip() for path in map(Path, LIMITS) if path.is_file()]
    total = min([memory.total, *(int(text) for text in texts if text.isdigit())])
    return total, min(memory.available, total)


def _verdict(
    what: str, needed: Mapping[str, float], total: float, free: float, less: Callable[[], str], spare: float = 0.0
) -> Verdict:
    """Compares the bytes `needed` by each part of the run, in order; the share `spare` of `total` stays free."""
    most = max(needed.values())
    here = f"{total / GIB:,.1f} GiB" + ("" if free == total else f", {free / GIB:,.1f} GiB of them free")
    both = f"about {most / GIB:,.1f} GiB are needed, there are {here}"
    usable = (1 - spare) * total
    if most > usable:
        first = next(part for part, size in needed.items() if size > usable)
        rule = "" if most > total else ", and a fifth should stay free"
        return Verdict(f"{what}: DOES NOT FIT{f' when {first}' if first else ''}: {both}{rule}; {less()}", False)
    return Verdict(f"{what}: {'fits' if most <= free else 'fits only when others give some back'}: {both}", True)


# ---- what would make it fit: options that are not set yet, tried in the plan -----------------------------------------


class LessMemory:
    """Searches for options that make `config` fit. `used` is the share of the memory that a configuration needs; above
    1 it does not fit. `gpus`: see `on_devices`."""

    def __init__(self, config: RunConfig, used: Callable[[Any], float], gpus: float) -> None:
        self.config, self.used, self.gpus = config, used, gpus

    def words(self) -> str:
        """Names changes that are enough: each of them alone, or else several together."""
        enough, families = list[str](), list(self._families())
        for family in families:
            if self._share(family[-1]) <= 1:
                enough.append(_words(next(changes for changes in family if self._share(changes) <= 1)))
            if len(enough) == MOST:
                break
        if enough:
            return f"it fits with {', or with '.join(enough)}"
        together = Changes()
        least = self._share(together)
        for family in (*families, *families):  # what helps may be seen only after another
            share = self._share(together | family[-1])
            if share < least * LEAST_GAIN:
                least, together = share, together | family[-1]
            if least <= 1:
                return f"it fits with {_words(together)} together"
        so_far = f", even with {_words(together)}, which need {least:.1f} times what may be used" if together else ""
        return f"no option makes it fit{so_far}; use larger devices or a smaller model"

    def _share(self, changes: Changes) -> float:
        """Returns the share that the run needs with these changes: infinite where it is refused."""
        content = self.config.model_dump()
        for key, value in changes.items():
            *sections, name = key.split(".")
            place = content
            for section in sections:
                place[section] = place[section] or {}
                place = place[section]
            place[name] = value
        try:
            changed = self.config.model_validate(content)
            return math.inf if any(contradictions(Plan(changed))) else self.used(changed)
        except ValueError:
            return math.inf

    def _families(self) -> Iterator[list[Changes]]:
        """Yields changes of one kind each, the weakest first. At first come those that change nothing that is
        learned."""
        config, rollout, gpus = self.config, self.config.whole_rollout, self.gpus
        sampler_apart = isinstance(config, TrainConfig) and rollout.backend != "vllm"
        if isinstance(config, LearningConfig):
            if not config.learner.gradient_checkpointing:
                yield [{"learner.gradient_checkpointing": True}]
            yield from _halves("learner.tokens_per_micro_batch", config.learner.tokens_per_micro_batch)
        elif isinstance(config, MtpConfig):
            yield from _halves("mtp.tokens_per_update", config.mtp.tokens_per_update)
        yield from _halves("rollout.prompts_per_shard", rollout.prompts_per_shard)
        if rollout.samplers > 1 and not gpus:
            yield from _halves("rollout.workers", rollout.workers)
        if gpus and not rollout.samplers and sampler_apart:
            yield [{"rollout.workers": 1}]
        if gpus and isinstance(config, LearningConfig) and (more := list(self._more_ranks(min(gpus, MOST_RANKS)))):
            yield more
        if config.dtype == "float32":
            yield [{"dtype": "bfloat16"}]
        if isinstance(config, LearningConfig):
            if config.learner.optimizer == "adamw":
                yield [{"learner.optimizer": "adamw_8bit"}]
            if config.dtype == "bfloat16" and not config.learner.rounds:
                yield [{"learner.optimizer": "adamw_8bit_stochastic"}]
        if isinstance(config, TrainConfig):
            if config.whole_rollout.staleness == 2:
                yield [{"rollout.staleness": 1}]
            if config.loss.beta:
                yield [{"loss.beta": 0.0}]
            if config.lora is None:
                yield [{"lora.rank": 16}]
            elif config.lora.base is None:
                yield [{"lora.base": "nf4"}]
        yield from _halves("rollout.max_completion_tokens", rollout.max_completion_tokens)

    def _more_ranks(self, most: float) -> Iterator[Changes]:
        """Yields twice, four times ... as many learners, which share the weights."""
        assert isinstance(self.config, LearningConfig)
        workers, fsdp = self.config.learner.workers, self.config.learner.parallel.fsdp
        now = (workers or 1) if fsdp is None else fsdp
        for more in (2, 4, 8, 16):
            if now * more <= most:
                both = {"learner.parallel.fsdp": fsdp * more} if fsdp else {}
                yield both | ({} if fsdp and not workers else {"learner.workers": (workers or 1) * more})


def _words(changes: Changes) -> str:
    pairs = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]
    return pairs[0] if len(pairs) == 1 else f"{', '.join(pairs[:-1])} and {pairs[-1]}"


def _halves(key: str, value: int) -> Iterator[list[Changes]]:
    if halves := [value >> i for i in (1, 2, 3) if value >> i >= SMALLEST.get(key, 1)]:
        yield [{key: half} for half in halves]
