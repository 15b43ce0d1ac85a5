"""The memory and disk of this machine, compared with the most that a run will need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from grpo.commands.memory_table import WARM_START, DeviceMemory

GIB = 2**30
PROCESS = 0.4 * GIB  # what torch itself needs in each process
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
LESS_MEMORY = (
    "lower learner.tokens_per_micro_batch or rollout.workers, or use dtype: bfloat16, lora.rank, "
    "learner.parallel.fsdp, learner.optimizer: adamw_8bit or learner.gradient_checkpointing: true"
)
LESS_DISK = "lower checkpoint.keep, make room, or use another output_dir"


def verdicts(
    devices: Sequence[DeviceMemory], device: torch.device, folder: Path, disk: float, gib: float | None = None
) -> Iterator[str]:
    """A line for memory and one for disk: what the run needs, what there is, whether it fits, and at which part of the
    run it will not.

    `devices` are those of `memory_of_run`; `disk` bytes will be written into `folder`. There is what this machine has,
    or devices of `gib` GiB each. On CPUs all processes share the memory. Estimates are rough, so nothing is refused.
    """
    if gib or device.type == "cuda":
        needed: dict[str, float] = {f"{phase} ({it.name})": size for it in devices for phase, size in it.phases.items()}
        name = f"a device of {gib:g} GiB" if gib else torch.cuda.get_device_name(device)
        free, total = (gib * GIB, gib * GIB) if gib else torch.cuda.mem_get_info(device)
        yield _line(f"memory of {name}", needed, total, free, LESS_MEMORY)
    else:
        needed = {}
        for warm in (True, False):  # one after the other
            for it in devices:
                for phase, size in it.phases.items() if (it.name == WARM_START) == warm else ():
                    part = f"{phase} in the warm start" if warm else phase
                    needed[part] = needed.get(part, 0.0) + it.count * (size + PROCESS)
        yield _line("memory", needed, *main_memory(), LESS_MEMORY)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    room = shutil.disk_usage(there).free
    yield _line(f"disk at {there}", {"": disk}, room, room, LESS_DISK)


def main_memory() -> tuple[float, float]:
    """(total bytes, free bytes), within the limit of a container."""
    memory = psutil.virtual_memory()
    texts = [path.read_text().strip() for path in map(Path, LIMITS) if path.is_file()]
    total = min([memory.total, *(int(text) for text in texts if text.isdigit())])
    return total, min(memory.available, total)


def _line(what: str, needed: Mapping[str, float], total: float, free: float, less: str) -> str:
    """`needed` are bytes by the part of the run that needs them, in order."""
    most = max(needed.values())
    here = f"{total / GIB:,.1f} GiB" + ("" if free == total else f", {free / GIB:,.1f} GiB of them free")
    both = f"about {most / GIB:,.1f} GiB are needed, there are {here}"
    if most > total:
        first = next(part for part, size in needed.items() if size > total)
        return f"{what}: DOES NOT FIT{f' when {first}' if first else ''}: {both}; {less}"
    return f"{what}: {'fits' if most <= free else 'fits only when others give some back'}: {both}"
