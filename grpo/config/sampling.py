"""Options of the rollout."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator

from rewards.config.options import Options

LOWEST_TEMPERATURE = 1e-6  # logits that are divided by less leave the range of float32: see rollout/sampling.py

LARGEST_GROUP = 65_536  # its lists are made before a step: a trillion would fill the memory
MOST_DRAFTS = 256  # every sequence has a place for each of them in the caches
MOST_RESAMPLES = 65_536  # each is a batch that is sampled


class SamplingOptions(Options):
    """How one completion is sampled; every command that samples has these options."""

    temperature: float = Field(default=1.0, ge=LOWEST_TEMPERATURE)
    """Sampling temperature."""
    max_completion_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens; a completion that has not stopped by then is cut."""
    draft_tokens: int | None = Field(default=None, ge=0, le=MOST_DRAFTS)
    """Drafts per forward of the trunk; 0 for none, null chooses by measured cost. Drafts never change a token."""


class AnswerOptions(SamplingOptions):
    """How a policy answers where nothing is learned from its answers: drafts may be taken unverified."""

    compile: Literal["on", "off"] = "off"
    """`on` decodes with compiled graphs while at most 32 completions are left (8 with experts), where the policy is our
    own, on a CPU. A graph takes a minute or two once, and is kept in ~/.cache/quartet. On a GPU it records CUDA graphs
    (experimental: never run on a GPU). In float32 graphs change no token."""
    lossy_margin: float | None = Field(default=None, ge=0)
    """Take a draft unverified (and count it) where its best token leads the second by more than this many nats. That is
    lossy; null never changes a token."""


class VLLMOptions(Options):
    """vLLM as the sampler, where rollout.backend is vllm. `make vllm` installs it beside quartet; the environment
    variable QUARTET_VLLM_PYTHON names the interpreter of another environment that has it."""

    url: str | None = None
    """http://HOST:PORT of a server that runs already (see docs/guides/vllm.md); null starts one on loopback, which ends
    with the run. The environment variable QUARTET_VLLM_TOKEN holds its token."""
    engine: dict[str, Any] = Field(default={})
    """More arguments of vLLM's engine, such as {max_model_len: 2048} or {tensor_parallel_size: 2}."""


class WorkersOptions(SamplingOptions):
    """How groups of completions are sampled, and by which processes."""

    group_size: int = 8
    """Completions per prompt; GRPO compares them with each other, so at least 2."""
    temperature: float = Field(default=1.0, ge=LOWEST_TEMPERATURE)
    """Sampling temperature; the learner scores at the same one. There is no top-p or top-k: both bias the gradient."""
    workers: int = Field(default=0, ge=0)
    """Ray rollout workers, each with one CPU thread and, if the cluster has GPUs, a GPU. 0 samples in this process,
    without Ray."""
    prompts_per_shard: int = Field(default=8, ge=1)
    """Prompts whose groups are sampled together; the number of workers never changes a token."""

    @field_validator("group_size")
    @classmethod
    def _compares(cls, group_size: int) -> int:
        if group_size < 2:
            raise ValueError("gives every completion a zero advantage; use 2 or more")
        if group_size > LARGEST_GROUP:
            raise ValueError(f"no batch holds such a group; use at most {LARGEST_GROUP:,}")
        return group_size


class RolloutOptions(WorkersOptions):
    """How completions are sampled."""

    backend: Literal["native", "transformers", "vllm"] | None = None
    """What samples: our engine, which decodes DeepSeek-V3 policies itself (`native`) and other models by transformers'
    own forward (null: the one that fits), or vLLM in an environment of its own (on a GPU experimental: never run on a
    GPU)."""
    staleness: Literal[0, 1, 2] = 0
    """1 samples the next batch while the learner works on this one, with weights that are one step older, by at least
    one worker. 2 samples one more, with weights two steps older, so that a slow batch delays nothing. Timing changes no
    bit; the importance correction is on."""
    vllm: VLLMOptions = VLLMOptions()
    quantization: Literal["none", "int8", "int4"] = "none"
    """The matrices that our engine samples and drafts with, routed experts included, in fewer bits than those that are
    learned, on a CPU; each weight sync makes them again. The importance correction is on. Held-out problems are
    answered with them too."""
    max_resamples: int = Field(default=0, ge=0, le=MOST_RESAMPLES)
    """Dynamic sampling: the next prompts of the data take the place of zero-variance groups, at most this many times
    per step; 0 keeps them."""

    @property
    def samplers(self) -> int:
        """Ray workers that the run has: sampling ahead needs one, and vLLM none."""
        return 0 if self.backend == "vllm" else max(self.workers, min(self.staleness, 1))

    @classmethod
    def of(cls, options: SamplingOptions) -> Self:
        """The rollout of a command that has fewer options of it."""
        return options if isinstance(options, cls) else cls(**options.model_dump())
