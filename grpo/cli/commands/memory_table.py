"""What a device holds in a run, which processes share a GPU, and the table that `--dry_run` prints of it.

Processes are placed as rollout/places.py and grpo/cli/launch.py place them, and Ray does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil

from rich.table import Column, Table

from grpo.config.run import LearningConfig, RunConfig

WARM_START = "warm start"  # it is over before GRPO begins


@dataclass(frozen=True)
class DeviceMemory:
    """A device holds these bytes. The fields before `loading` are held all the time, gradients only while a step
    learns, and the others one at a time. `host` is in main memory, where the run has devices with their own."""

    name: str
    count: int = 1  # of such devices
    in_turn: bool = False  # the sampler leaves the device while the learner works
    on_host: bool = False  # the process uses no device, though others do
    weights: int = 0  # of the policy that learns, adapters and draft head with it
    masters: int = 0
    gradients: int = 0
    moments: int = 0
    reference: int = 0
    teacher: int = 0  # of loss.advantage: distill
    sampler: int = 0  # its own copy of the policy
    derived: int = 0  # from that copy, for decoding
    older: int = 0  # weights that the batch in flight needs (rollout.ahead: 2)
    buffers: int = 0  # that FSDP keeps from its first step on
    loading: int = 0  # what is whole for a moment while shares are read
    activations: int = 0
    gathered: int = 0  # by FSDP, beside the activations
    rollout: int = 0
    graphs: int = 0  # the memory that recorded CUDA graphs keep for themselves
    publication: int = 0  # W + ΔW, and what was derived before, until the new is there; a weight that is whole
    saving: int = 0  # a weight that is whole
    host: int = 0  # what a process holds in main memory while it loads, or while it has left the device

    @property
    def phases(self) -> dict[str, int]:
        """Each part of a run needs so much at most; they are in its order.

        >>> DeviceMemory("a", weights=2, moments=8, activations=5, rollout=3, publication=1).phases
        {'loading': 2, 'sampling': 13, 'learning': 15, 'publishing': 11, 'saving': 10}
        """
        loaded = self.weights + self.reference + self.teacher
        steady = loaded + self.masters + self.moments + self.sampler + self.derived
        steady += self.older + self.buffers + self.graphs
        away = self.sampler + self.derived + self.graphs if self.in_turn else 0
        return {
            "loading": loaded + self.loading,
            "sampling": steady + self.rollout,
            "learning": steady - away + self.gradients + self.activations + self.gathered,
            "publishing": steady + self.publication,
            "saving": steady + self.saving,
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def beside(self, other: DeviceMemory, times: int, name: str, *, in_turn: bool) -> DeviceMemory:
        """Adds `times` others of one kind on the same device to this process.

        >>> both = DeviceMemory("a", weights=2).beside(DeviceMemory("b", sampler=5), 2, "both", in_turn=True)
        >>> both.phases
        {'loading': 2, 'sampling': 12, 'learning': 2, 'publishing': 12, 'saving': 12}
        """
        sizes = {f.name: getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)[4:]}
        return DeviceMemory(name, self.count, in_turn, **sizes)


def each_of(count: int, what: str) -> str:
    return f"the {what}" if count == 1 else f"each of {count} {what}s"


def on_devices(learner: DeviceMemory, worker: DeviceMemory, config: RunConfig, gpus: float) -> list[DeviceMemory]:
    """Returns the devices of the learners and of the Ray workers, from what one process of each holds. `gpus`: how many
    there are. 0 is a run on CPUs, where no process has a device of its own. Infinity: as many as the run asks for."""
    share, workers, ranks = config.whole_rollout.gpus_per_worker, worker.count, learner.count
    if not gpus:
        return [learner, worker]
    placed_by_ray = isinstance(config, LearningConfig) and config.learner.workers > 0
    no_others = gpus <= ranks and not placed_by_ray
    if not share or (no_others and config.whole_rollout.ahead):  # Ray is shown the GPUs that the learners leave: none
        return [learner, replace(worker, name=f"{worker.name}, on CPUs", on_host=True)]
    on_one = min(int(1 / share + 1e-6), workers)
    if not (config.whole_rollout.colocate or no_others):
        return [learner, *_together(worker, workers, on_one)]
    beside = 1 if placed_by_ray else on_one  # a learner that Ray has placed leaves room for one, see gpu_share
    shared = min(ranks, ceil(workers / beside))
    company = "worker" if beside == 1 else f"{beside} workers"
    learners = "learner" if ranks == 1 else "one rank" if shared == 1 else f"each of {shared} ranks"
    name = f"{learners} and {company}, in turn"
    devices = [replace(learner, count=shared).beside(worker, beside, name, in_turn=True)]
    if ranks > shared:
        devices.append(replace(learner, name=each_of(ranks - shared, "other rank"), count=ranks - shared))
    if workers > shared * beside:
        devices += _together(worker, workers - shared * beside, on_one)
    return devices


def _together(worker: DeviceMemory, workers: int, on_one: int) -> list[DeviceMemory]:
    """Puts workers on devices without a learner, `on_one` on each."""
    if on_one == 1:
        return [replace(worker, name=each_of(workers, "worker"), count=workers)]
    count = ceil(workers / on_one)
    name = f"{'the GPU' if count == 1 else f'each of {count} GPUs'} of {on_one} workers"
    return [replace(worker, count=count).beside(worker, on_one - 1, name, in_turn=False)]


ROWS = {
    "weights": "weights",
    "masters": "fp32 masters of bfloat16 weights",
    "gradients": "gradients",
    "moments": "AdamW moments",
    "reference": "reference policy",
    "teacher": "teacher",
    "sampler": "sampler: its own copy",
    "derived": "sampler: derived from it",
    "older": "older weights, for the batch in flight",
    "graphs": "recorded CUDA graphs ≈",
    "buffers": "buffers of FSDP",
    "activations": "then: activations of a micro-batch ≈",
    "gathered": "with: layers that FSDP has gathered ≈",
    "rollout": "or: latent cache and logits ≈",
    "publication": "or: publication of the weights",
    "saving": "or: a whole weight, to save it",
    "peak": "at most, about",
    "host": "main memory while loading ≈",
}


def table(devices: Sequence[DeviceMemory]) -> Table:
    """Returns a table in GiB with a column per kind of device; rows of zeros are left out."""
    columns = [Column(device.name, justify="right") for device in devices]
    result = Table("", *columns, title="memory in GiB, by device", title_justify="left")
    for name, words in ROWS.items():
        sizes = [getattr(device, name) for device in devices]
        if any(sizes):
            end = name in ("buffers", "saving", "peak")
            result.add_row(words, *(f"{size / 2**30:,.2f}" if size else "" for size in sizes), end_section=end)
    return result
