"""The memory and disk of this machine, compared with the most that a run will need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from grpo.commands.memory import DeviceMemory

GIB = 2**30
PROCESS = 0.4 * GIB  # what torch itself needs in each process
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
LESS_MEMORY = (
    "lower learner.tokens_per_micro_batch or rollout.workers, or use dtype: bfloat16, lora.rank or "
    "learner.gradient_checkpointing: true"
)
LESS_DISK = "lower checkpoint.keep, make room, or use another output_dir"


def verdicts(
    devices: Sequence[DeviceMemory], workers: int, device: torch.device, folder: Path, disk: float
) -> Iterator[str]:
    """A line for memory and one for disk: what the run needs, what this machine has, and whether it fits.

    `devices` are those of `memory_of_run`, the last of them a Ray worker where there are `workers`; `disk` bytes will
    be written into `folder`. Estimates are rough, so nothing is refused.
    """
    before = [it for it in devices if it.name == "warm start"]  # freed when GRPO begins
    rest = [it for it in devices if it.name != "warm start"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        most = max(it.peak for it in devices)
        yield _line(f"memory of {torch.cuda.get_device_name(device)}", most, total, free, LESS_MEMORY)
    else:
        at_once = sum(it.peak + PROCESS for it in rest)
        if workers > 1:
            at_once += (workers - 1) * (rest[-1].peak + PROCESS)
        needed = max([at_once, *(it.peak + PROCESS for it in before)])
        yield _line("memory", needed, *main_memory(), LESS_MEMORY)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    room = shutil.disk_usage(there).free
    yield _line(f"disk at {there}", disk, room, room, LESS_DISK)


def main_memory() -> tuple[float, float]:
    """(total bytes, free bytes), within the limit of a container."""
    memory = psutil.virtual_memory()
    texts = [path.read_text().strip() for path in map(Path, LIMITS) if path.is_file()]
    total = min([memory.total, *(int(text) for text in texts if text.isdigit())])
    return total, min(memory.available, total)


def _line(what: str, needed: float, total: float, free: float, less: str) -> str:
    here = f"{total / GIB:,.1f} GiB" + ("" if free == total else f", {free / GIB:,.1f} GiB of them free")
    both = f"about {needed / GIB:,.1f} GiB are needed, there are {here}"
    if needed > total:
        return f"{what}: DOES NOT FIT: {both}; {less}"
    return f"{what}: {'fits' if needed <= free else 'fits only when others give some back'}: {both}"
