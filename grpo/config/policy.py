"""Options of the policy: where it comes from and how it computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grpo.config.options import Options


class HeadsOptions(Options):
    """Attention heads that are chosen by need, a mixture of heads. A policy without routers gets fresh ones, and has to
    learn with fewer heads; `balance` keeps heads equally busy as it does experts."""

    active: float = Field(default=0.33, gt=0, le=1)
    """Share of the heads that compute for a token."""
    shared: int = Field(default=0, ge=0)
    """How many of them compute for every token."""


class PolicyOptions(Options):
    """What a policy computes otherwise than its checkpoint says. The trained policy remembers it."""

    prompt_attention: Literal["causal", "bidirectional"] | None = None
    """What the tokens of a prompt see of it: those before them (`causal`), or all of it (`bidirectional`, a prefix-LM).
    Completions are causal either way. null: as the checkpoint was trained, `causal` where it does not say."""
    heads: HeadsOptions | None = None
    """Dynamic heads: a router in each layer chooses the attention heads that compute for a token. null: as the
    checkpoint was trained, all of them where it has no routers."""


class ModelOptions(Options):
    """What a policy is loaded from, and how it computes."""

    model: str = "tiny"
    """A preset (`tiny`), a checkpoint folder, a GGUF file or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of learner and sampler; the optimizer keeps fp32 copies of bfloat16 weights."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of this process. null takes OMP_NUM_THREADS where it is set, else one thread for every 8 M parameters
    of the policy, but no more than there are cores. A resumed run keeps its number of threads."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: the GPU where there is one."""
    add_mtp: bool = False
    """Give a fresh MTP head to a DeepSeek-V3 checkpoint that has none. Teach it with `quartet mtp` before GRPO, where a
    head that gains nothing yet learns only in every `mtp.idle_every`-th step."""
    policy: PolicyOptions = PolicyOptions()
    seed: int = 0
    """Seed of everything: weights of a preset, data order, sampling noise."""
