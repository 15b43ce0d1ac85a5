"""Options of the policy: where it comes from and how it computes."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rewards.config.options import Options

MOST_THREADS = 1024  # more than any machine has cores; torch accepts 2**31 and then cannot start them


class ModelOptions(Options):
    """What a policy is loaded from; every command that has a policy has these options."""

    model: str = "tiny"
    """A preset (`tiny`), a checkpoint folder, a GGUF file or a hub id."""
    device: str = "auto"
    """`cpu`, or an accelerator of this machine (`cuda`, `xpu`, `mps`); `auto` takes the accelerator if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of learner and sampler; the optimizer keeps fp32 copies of bfloat16 weights. `auto` is bfloat16 on an
    accelerator that computes in it, and float32 elsewhere."""
    threads: int | None = Field(default=None, ge=1, le=MOST_THREADS)
    """CPU threads of this process. null takes OMP_NUM_THREADS where it is set, else one thread for every 8 M parameters
    of the policy, but no more than there are cores. A resumed run keeps its number of threads."""
    seed: int = 0
    """Seed of everything: weights of a preset, data order, sampling noise."""

    @field_validator("seed")
    @classmethod
    def _fits_torch(cls, seed: int) -> int:
        if not -(2**63) <= seed < 2**64:
            raise ValueError("torch takes no such seed; use a number from -2**63 to 2**64 - 1")
        return seed

    @model_validator(mode="after")
    def _dtype_of_device(self, info: ValidationInfo) -> Self:
        """Replace `auto` by the precision of the device, so that config.yaml shows it.

        This asks torch, whose import takes seconds. So it comes after every option is known to be valid: a typo is
        answered at once.
        """
        checked_only = (info.context or {}).get("checked_only", False)
        if self.dtype == "auto" and not checked_only:
            self.__dict__["dtype"] = _dtype_of(self.device)  # an assignment would validate everything again
        return self


def _dtype_of(device: str) -> str:
    if device == "cpu":
        return "float32"
    from policies.devices import device_of, has_bfloat16

    with suppress(ValueError):  # a device that is not there is refused elsewhere
        if has_bfloat16(device_of(device)):
            return "bfloat16"
    return "float32"


class ArchitectureOptions(Options):
    """What a policy that learns computes otherwise than its checkpoint says. The trained policy remembers it."""

    prompt_attention: Literal["causal", "bidirectional"] | None = None
    """What the tokens of a prompt see of it: those before them (`causal`), or all of it (`bidirectional`, a prefix-LM).
    Completions are causal either way. null: as the checkpoint was trained, `causal` where it does not say."""
    active_heads: float | None = Field(default=None, gt=0, le=1)
    """Dynamic heads: a router in each layer chooses the share of the attention heads that compute for a token, such as
    .33. A policy without routers gets fresh ones, and has to learn with fewer attention heads. null: as the checkpoint
    was trained, all of them where it has no routers."""
