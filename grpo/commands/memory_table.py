"""What a device holds in a run, and the table that `--dry_run` prints of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

WARM_START = "warm start"  # it is over before GRPO begins


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device. The fields before `loading` are held all the time, gradients only while a step learns, and
    the others one at a time."""

    name: str
    count: int = 1  # of such devices
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
    publication: int = 0  # W + ΔW, and what was derived before, until the new is there; a weight that is whole
    saving: int = 0  # a weight that is whole

    @property
    def phases(self) -> dict[str, int]:
        """The most at each part of a run, in its order.

        >>> DeviceMemory("a", weights=2, moments=8, activations=5, rollout=3, publication=1).phases
        {'loading': 2, 'sampling': 13, 'learning': 15, 'publishing': 11, 'saving': 10}
        """
        loaded = self.weights + self.reference + self.teacher
        steady = loaded + self.masters + self.moments + self.sampler + self.derived
        steady += self.older + self.buffers
        return {
            "loading": loaded + self.loading,
            "sampling": steady + self.rollout,
            "learning": steady + self.gradients + self.activations + self.gathered,
            "publishing": steady + self.publication,
            "saving": steady + self.saving,
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())


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
    "publication": "or: publication of the weights",
    "saving": "or: a whole weight, to save it",
    "peak": "at most, about",
}


def table(devices: Sequence[DeviceMemory]) -> Table:
    """A table in GiB with a column per kind of device; rows of zeros are left out."""
    shown = Table(title="memory in GiB, by device", title_justify="left")
    shown.add_column("")
    for device in devices:
        shown.add_column(device.name, justify="right")
    for name, words in ROWS.items():
        sizes = [getattr(device, name) for device in devices]
        if any(sizes):
            end = name in ("buffers", "saving", "peak")
            shown.add_row(words, *(f"{size / 2**30:,.2f}" if size else "" for size in sizes), end_section=end)
    return shown
