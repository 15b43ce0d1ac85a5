"""Where vLLM is and how it is started, and what its engine is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from policies.policy import Policy
from rollout.vllm.process import interpreter

MAX_ROWS = 256  # completions that are decoded together, as many as in our own engine
KV_CACHE_BYTES = 2 << 30  # on a CPU; vLLM waits with rows that have no place in it
MOST_TOKENS = 4096  # of a forward on a CPU
GPU_SHARE = 0.4  # of the memory of a GPU that the learner needs too; of another one vLLM takes what it likes


@dataclass(frozen=True)
class VLLMSettings:
    """Where vLLM is: a server that runs already (`url`, `token`), or an interpreter to start one with (`python`).

    `engine` are more arguments of vLLM's engine. `draft_tokens` drafts are made in every forward, by the policy's MTP
    head. A server of our own appends to `log`. `silence_s` may pass without a finished forward, `sync_s` until new
    weights are loaded.
    """

    url: str | None = None
    token: str = ""
    python: Path = field(default_factory=interpreter)
    engine: Mapping[str, Any] = field(default_factory=dict)
    draft_tokens: int = 0
    log: Path = Path("vllm.log")
    silence_s: float = 300.0
    sync_s: float = 600.0
    without: Sequence[str] = ()  # bypasses of inside/quartet_bypasses.py that a test leaves out

    def load(
        self, policy: Policy, dtype: torch.dtype, context: int, on_cpu: bool, shares: bool = True, in_turn: bool = False
    ) -> dict[str, Any]:
        """The request that has the model made; its weights are published afterwards. On a GPU that it `shares` with the
        learner vLLM has a part of the memory, which it leaves to the learner where they work `in_turn`."""
        arguments: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": context,
            "max_num_seqs": MAX_ROWS,
            "enable_prefix_caching": True,
        }
        if on_cpu:
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES}
            # It cannot read a prompt in pieces and draw with a seed: a generator of a CPU cannot be turned back.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, MOST_TOKENS)}
        else:
            arguments |= {"gpu_memory_utilization": GPU_SHARE} if shares else {}
            arguments |= {"enable_sleep_mode": True} if in_turn else {}
        if self.draft_tokens:
            # Drafts that are drawn are accepted where a policy is not sure, and greedy ones are not.
            drawn = {"num_speculative_tokens": self.draft_tokens, "draft_sample_method": "probabilistic"}
            arguments["speculative_config"] = {"method": "mtp", **drawn}
            arguments["per_request_spec_decode_metrics"] = "detailed"
        config = policy.config.to_dict() | {"architectures": [type(policy.trunk).__name__]}
        if policy.backend == "native":
            config["num_nextn_predict_layers"] = int(self.draft_tokens > 0)
        return {"config": config, "arguments": arguments | dict(self.engine), "without": list(self.without)}
