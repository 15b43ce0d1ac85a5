"""Options of the learner: optimizer, ranks, adapters, draft head, SFT stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rewards.config.options import Options


class ParallelOptions(Options):
    """How several processes share one learner. What fsdp x tensor leaves of them are copies, each for other rows."""

    fsdp: int | None = Field(default=None, ge=1)
    """Ranks that each hold a share of every weight, gradient and moment (FSDP2); null: all, so that there is one copy.
    """
    tensor: int = Field(default=1, ge=1)
    """Ranks that each compute a part of every MLP, expert, embedding and LM head, on the same rows."""
    expert: int = Field(default=1, ge=1)
    """Ranks that each hold some of the routed experts whole; tokens travel to them. It divides fsdp x tensor."""

    def shares(self, size: int) -> tuple[int, int]:
        """`fsdp` and the number of copies for a run of `size` processes. Raises ValueError where the options do not fit
        their number."""
        fsdp = self.fsdp or max(size // self.tensor, 1)
        copies, rest = divmod(size, fsdp * self.tensor)
        if rest:
            raise ValueError(
                f"learner.parallel: fsdp={self.fsdp}, tensor={self.tensor} need a multiple of "
                f"{(self.fsdp or 1) * self.tensor} processes, and there are {size}; start so many with accelerate "
                "launch, torchrun or learner.workers"
            )
        if self.expert > 1 and (fsdp * self.tensor % self.expert or self.expert % self.tensor):
            raise ValueError(
                f"learner.parallel.expert={self.expert} must divide fsdp x tensor = {fsdp * self.tensor} and be a "
                f"multiple of tensor = {self.tensor}"
            )
        return fsdp, copies


class UpdateOptions(Options):
    """How weights are updated: the optimizer, the ranks, and how a batch is cut."""

    optimizer: Literal["adamw", "adamw_8bit", "adamw_8bit_stochastic"] = "adamw"
    """adamw_8bit keeps AdamW's moments in 8 bits, 2 bytes a weight in place of 8. It needs torchao (extra `low-memory`)
    and a C++ compiler. With adamw_8bit_stochastic bfloat16 weights have no fp32 masters, 4 bytes a weight: each step is
    rounded up or down by chance, right in the mean."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate of the policy (LoRA needs about ten times the rate of full updates)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate over `steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Padded tokens of one forward and backward pass; this bounds the memory and changes no gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    workers: int = Field(default=0, ge=0)
    """Learner ranks that Ray Train starts, on the cluster of RAY_ADDRESS or on this machine; 0: accelerate, torchrun or
    nobody has started several. By NCCL they are experimental: never run on a GPU."""
    parallel: ParallelOptions = ParallelOptions()

    @property
    def rounds(self) -> bool:
        """Tells whether weights are rounded by chance, without fp32 masters."""
        return self.optimizer == "adamw_8bit_stochastic"

    @field_validator("betas")
    @classmethod
    def _are_shares(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("use two numbers, each 0 or more and below 1")
        return betas


class SftLearnerOptions(UpdateOptions):
    """The optimizer of supervised steps, and how a batch is cut."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the policy."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay of the learning rate over `steps`."""


class LearnerOptions(UpdateOptions):
    """The optimizer of GRPO, and how a batch is cut."""

    updates_per_batch: int = Field(default=1, ge=1, le=1024)
    """Optimizer updates on each batch of rollouts."""
    routing_replay: bool = False
    """The learner's forward uses the experts and the dynamic heads that the sampler chose, for the prompt too."""


class LoraOptions(Options):
    """Low-rank adapters through peft."""

    base: Literal["nf4"] | None = None
    """nf4 keeps the frozen weights under the adapters in 4 bits (bitsandbytes, extra `low-memory`): those of the linear
    modules, but not embedding, LM head, routers, routed experts and draft head. null keeps them in `dtype`."""
    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is alpha / rank · BA."""
    targets: list[str] | None = None
    """Module names, `experts` (the routed ones), `router`, and `mtp`: the draft head gets adapters on all of its layers
    instead of being trained whole. By default every linear layer of the trunk and the experts."""


class MTPOptions(Options):
    """Training of the draft head beside the policy. During GRPO it rests while drafts gain less than a tenth in the
    rollouts (`draft/gain`): it learns in every tenth step, from groups whose rewards differ. The gain follows from
    draft_costs.json: runs that measured other costs may train their draft heads in other steps."""

    loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the draft loss; 0 leaves the draft head as it is."""
    depth: int = Field(default=4, ge=1)
    """How many depths are unrolled in training."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the draft head."""


class SftMTPOptions(MTPOptions):
    """Training of the draft head during supervised steps."""

    train_base_model: bool = False
    """Cross-entropy on the gold tokens through draft head and trunk (DeepSeek-V3; loss_weight 0.3 or 0.1 there), in
    place of teaching the draft head alone."""


class SftStageOptions(Options):
    """Supervised steps on the gold solutions before GRPO."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 skips the SFT stage."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay over the SFT stage."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
