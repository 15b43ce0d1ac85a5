"""What a device holds in a run, which processes share a GPU, and the table that `--dry_run` prints of it.

Processes are placed as rollout/places.py and grpo/cli/launch.py place them, and Ray does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from grpo.config.run import LearningConfig, RunConfig

SFT_STAGE = "SFT stage"  # it is over before GRPO begins


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
    older: int = 0  # weights that the batch in flight needs (rollout.staleness: 2)
    buffers: int = 0  # that FSDP keeps from its first step on
    loading: int = 0  # what is whole for a moment while shares are read
    activations: int = 0
    gathered: int = 0  # by FSDP, beside the activations
    rollout: int = 0
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
        steady += self.older + self.buffers
        away = self.sampler + self.derived if self.in_turn else 0
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

    def beside(self, other: DeviceMemory, name: str, *, in_turn: bool) -> DeviceMemory:
        """Add another process on the same device to this one.

        >>> both = DeviceMemory("a", weights=2).beside(DeviceMemory("b", sampler=5), "both", in_turn=True)
        >>> both.phases
        {'loading': 2, 'sampling': 7, 'learning': 2, 'publishing': 7, 'saving': 7}
        """
        sizes = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[4:]}
        return DeviceMemory(name, self.count, in_turn, **sizes)


def each_of(count: int, what: str) -> str:
    return f"the {what}" if count == 1 else f"each of {count} {what}s"


def on_devices(learner: DeviceMemory, worker: DeviceMemory, config: RunConfig, gpus: float) -> list[DeviceMemory]:
    """Returns the devices of the learners and of the Ray workers, from what one process of each holds. `gpus`: how many
    there are. 0 is a run on CPUs, where no process has a device of its own. Infinity: as many as the run asks for."""
    workers, ranks = worker.count, learner.count
    if not gpus:
        return [learner, worker]
    placed_by_ray = isinstance(config, LearningConfig) and config.learner.workers > 0
    no_others = gpus <= ranks and not placed_by_ray
    if no_others and config.whole_rollout.staleness:  # Ray is shown the GPUs that the learners leave: none
        return [learner, replace(worker, name=f"{worker.name}, on CPUs", on_host=True)]
    if not no_others:
        return [learner, replace(worker, name=each_of(workers, "worker"))]
    shared = min(ranks, workers)
    learners = "learner" if ranks == 1 else "one rank" if shared == 1 else f"each of {shared} ranks"
    devices = [replace(learner, count=shared).beside(worker, f"{learners} and worker, in turn", in_turn=True)]
    if ranks > shared:
        devices.append(replace(learner, name=each_of(ranks - shared, "other rank"), count=ranks - shared))
    if workers > shared:
        devices.append(replace(worker, name=each_of(workers - shared, "worker"), count=workers - shared))
    return devices


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
    "buffers": "buffers of FSDP",
    "activations": "then: activations of a micro-batch ≈",
    "gathered": "with: layers that FSDP has gathered ≈",
    "rollout": "or: latent cache and logits ≈",
    "publication": "or: weight sync",
    "saving": "or: a whole weight, to save it",
    "peak": "at most, about",
    "host": "main memory while loading ≈",
}


def rows(devices: Sequence[DeviceMemory]) -> list[dict[str, str]]:
    """The rows of a table in GiB with a column per kind of device; rows of zeros are left out."""
    result = []
    for name, words in ROWS.items():
        sizes = {device.name: getattr(device, name) for device in devices}
        if any(sizes.values()):
            cells = {device: f"{size / 2**30:,.2f}" if size else "" for device, size in sizes.items()}
            result.append({"part": words} | cells)
    return result
