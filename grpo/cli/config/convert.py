"""Options of `quartet convert`: a dense Llama-family checkpoint as a DeepSeek-V3 policy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from grpo.config.policy import MOST_THREADS
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


class ConvertConfig(Options):
    """A dense Llama-family checkpoint as a DeepSeek-V3 policy that computes the same."""

    command: ClassVar[str] = "convert"
    ffn: Literal["dense", "moe"] = "dense"
    """What becomes of the feed-forward: `dense` as it was, `moe` experts with a router, exact all the same."""
    experts: ExpertOptions = ExpertOptions()
    calibrate: str | None = None
    """Text that the draft head (--mtp) is fitted to: a text file, a file with questions and answers
    (.jsonl, .json, .parquet, .csv), or a dataset such as `gsm8k`. Its last part is held out for the report."""
    calibrate_tokens: int = Field(default=16384, ge=1)
    """Tokens that it reads, 512 at a time."""
    held_out_tokens: int = Field(default=4096, ge=1)
    """Tokens held out for the report; at most a fifth of the text."""
    device: str = "auto"
    """`cpu`, or an accelerator of this machine (`cuda`, `xpu`, `mps`); `auto` takes the accelerator if there is one."""
    threads: int | None = Field(default=None, ge=1, le=MOST_THREADS)
    """CPU threads; all cores by default."""
    seed: int = 0
    """Seed of the router, the noise on experts and the order of the text."""

    @model_validator(mode="after")
    def _consistent(self) -> ConvertConfig:
        if self.ffn == "dense" and self.experts != ExpertOptions():
            raise ValueError("experts.* has no effect with ffn=dense; add --ffn moe, or drop it")
        return self
