"""Options of `quartet convert`: a dense Llama-family checkpoint as a DeepSeek-V3 policy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rewards.config.options import Options


class ExpertOptions(Options):
    """With ffn=moe: each feed-forward is cut into shared_experts + experts_per_group shards of equal width. Every
    expert group holds a copy of the routed ones, and a token uses one group: the same output for the same FLOPs."""

    shared_experts: int = Field(default=2, ge=1)
    """Shards that every token uses."""
    experts_per_group: int = Field(default=2, ge=2)
    """Shards that are routed: the experts of one group. A token uses all experts of its group."""
    expert_groups: int = Field(default=4, ge=2)
    """Copies of the routed shards."""
    dense_layers: int = Field(default=1, ge=0)
    """First layers that keep a dense feed-forward."""
    noise: float = Field(default=0.0, ge=0, lt=1)
    """Noise on the routed experts, as a share of their size, so that copies differ sooner; 0 is exact."""


class RecoveryOptions(Options):
    """With recover: KL distillation of the compressed policy from the dense one, on the text of `calibrate`."""

    trained: Literal["attention", "all"] = "attention"
    """What is trained: the attention, which compression has changed, or all weights."""
    learning_rate: float = Field(default=3e-5, gt=0)
    """Peak learning rate of AdamW, decaying to 0 along a cosine after two steps of warm-up; a few steps at ten times
    that do harm."""


class ConvertConfig(Options):
    """A dense Llama-family checkpoint as a DeepSeek-V3 policy: exactly, or with a smaller cache."""

    command: ClassVar[str] = "convert"
    ffn: Literal["dense", "moe"] = "dense"
    """What becomes of the feed-forward: `dense` as it was, `moe` experts with a router, exact all the same."""
    experts: ExpertOptions = ExpertOptions()
    rank: int | None = None
    """Compress the cache to this many numbers per layer and token, latent and rotary key together; null is the exact
    form, with 2 · KV heads · head_dim + 4."""
    rotary: int | None = Field(default=None, ge=2)
    """How many of them are the rotary key (even); null chooses by measurement."""
    calibrate: str | None = None
    """Text that compression and the draft head are fitted to: a text file, a file with questions and answers
    (.jsonl, .json, .parquet, .csv), or a dataset such as `gsm8k`. Its last part is held out for the report."""
    calibrate_tokens: int = Field(default=16384, ge=1)
    """Tokens that are measured, 512 at a time; longer distances are not."""
    held_out_tokens: int = Field(default=4096, ge=1)
    """Tokens held out for the report; at most a fifth of the text."""
    recover: int = Field(default=0, ge=0)
    """Steps of KL distillation after compression; Ctrl-C ends it early and keeps what it has reached."""
    recovery: RecoveryOptions = RecoveryOptions()
    device: str = "auto"
    """`cpu`, or an accelerator of this machine (`cuda`, `xpu`, `mps`); `auto` takes the accelerator if there is one."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores by default."""
    seed: int = 0
    """Seed of the router, the noise on experts and the order of the text."""

    @model_validator(mode="after")
    def _consistent(self) -> ConvertConfig:
        if self.ffn == "dense" and self.experts != ExpertOptions():
            raise ValueError("experts.* has no effect with ffn=dense; add --ffn moe, or drop it")
        if self.rank is not None and self.calibrate is None:
            raise ValueError(f"rank={self.rank} requires text to measure the model on; add --calibrate FILE")
        for name in ("rotary", "recover"):
            if getattr(self, name) and self.rank is None:
                raise ValueError(f"{name}={getattr(self, name)} is for the compressed form; add --rank, or drop it")
        if self.rotary and self.rotary % 2:
            raise ValueError(f"rotary={self.rotary} is odd, and rotary dimensions come in pairs")
        if not self.recover and self.recovery != RecoveryOptions():
            raise ValueError("recovery.* has no effect with recover=0; add --recover STEPS, or drop it")
        return self
