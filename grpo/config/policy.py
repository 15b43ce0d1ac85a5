"""Options of the policy: where it comes from and how it computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grpo.config.options import Options


class ModelOptions(Options):
    """What a policy is loaded from; shared by every command."""

    model: str = "tiny"
    """A preset (`tiny`), a checkpoint folder or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of learner and sampler; the optimizer keeps fp32 masters of bfloat16 weights."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of this process. null is OMP_NUM_THREADS, else one for every 8 M parameters of the policy, as far as
    there are cores; a run that is resumed keeps its number."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: the GPU where there is one."""
    add_mtp: bool = False
    """Give a fresh MTP head to a DeepSeek-V3 checkpoint that has none."""
    seed: int = 0
    """Seed of everything: weights of a preset, data order, sampling noise."""
