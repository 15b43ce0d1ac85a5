"""vLLM as a pool: the same prompts, parameters and groups as with our own engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policies.policy import Policy
from rollout.backends.vllm import weights as wire
from rollout.backends.vllm.client import Client
from rollout.backends.vllm.completions import completion_of, seed_of
from rollout.backends.vllm.process import PYTHON, VLLMProcess
from rollout.depth import CostTable
from rollout.faults import OnFinished, RolloutError, not_finite, prompt_fault
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams

LOAD_S = 600.0  # vLLM imports itself and makes the model
MAX_ROWS = 256  # completions that are decoded together, as many as in our own engine
KV_CACHE_BYTES = 2 << 30  # on a CPU; vLLM waits with rows that have no place in it
MOST_TOKENS = 4096  # of a forward on a CPU
GPU_SHARE = 0.4  # of a GPU's memory, which the learner needs too


@dataclass(frozen=True)
class VLLMSettings:
    """Where vLLM is: a server that runs already (`url`, `token`), or an interpreter to start one with (`python`).

    `engine` are more arguments of vLLM's engine. `draft_tokens` drafts are made in every forward, by the policy's MTP
    head. A server of our own appends to `log`. `silence_s` may pass without a finished forward, `publish_s` until new
    weights are loaded.
    """

    url: str | None = None
    token: str = ""
    python: Path = PYTHON
    engine: Mapping[str, Any] = field(default_factory=dict)
    draft_tokens: int = 0
    log: Path = Path("vllm.log")
    silence_s: float = 300.0
    publish_s: float = 600.0
    without: Sequence[str] = ()  # bypasses of inside/quartet_bypasses.py that a test leaves out


class VLLMPool:
    """A Pool (see rollout/pool.py) whose engine is vLLM's, in a process of its own.

    The prompts of a call are sampled together; vLLM batches them by itself. Its noise is not keyed as ours is: the
    tokens are others than those of our engine, and other ones with drafts than without. The same call with the same
    weights gives the same bits on a CPU.
    """

    def __init__(
        self,
        policy: Policy,
        settings: VLLMSettings,
        dtype: torch.dtype,
        threads: int = 1,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.policy, self.context = settings, policy, policy.max_length
        if settings.draft_tokens and policy.mtp is None:
            raise RolloutError(
                f"rollout.draft_tokens={settings.draft_tokens}, but this policy has no MTP head; "
                "set it to 0, or load the policy with a head"
            )
        self.version: int | None = None  # that vLLM has confirmed
        self.updates = wire.Updates(policy, head=settings.draft_tokens > 0)
        self._unreported: dict[str, float] = {}
        self.process: VLLMProcess | None = None
        url, token, why = settings.url, settings.token, _lost_elsewhere
        if url is None:
            self.process = VLLMProcess(settings.python, settings.log, threads, while_waiting)
            url, token, why = self.process.url, self.process.token, self.process.told
        self.client = Client(url, token, while_waiting, why)
        try:
            self.state = self._load(dtype)
            self.publish(policy.publication(), 0)
        except BaseException:
            self.close()
            raise

    def _load(self, dtype: torch.dtype) -> dict[str, Any]:
        """Has the model made, whose weights are published next. Returns what the server says of itself."""
        drafts, on_cpu = self.settings.draft_tokens, self.client.state()["on_cpu"]
        arguments: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": self.context,
            "max_num_seqs": MAX_ROWS,
            "enable_prefix_caching": True,
        }
        if on_cpu:
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES}
            # It cannot read a prompt in pieces and draw with a seed: a generator of a CPU cannot be turned back.
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(self.context, MOST_TOKENS)}
        else:
            arguments["gpu_memory_utilization"] = GPU_SHARE
        if drafts:
            # Drafts that are drawn are accepted where a policy is not sure, and greedy ones are not.
            drawn = {"num_speculative_tokens": drafts, "draft_sample_method": "probabilistic"}
            arguments["speculative_config"] = {"method": "mtp", **drawn}
            arguments["per_request_spec_decode_metrics"] = "detailed"
        config = self.policy.config.to_dict() | {"architectures": [type(self.policy.trunk).__name__]}
        if self.policy.backend == "native":
            config["num_nextn_predict_layers"] = int(drafts > 0)
        load = {
            "config": config,
            "arguments": arguments | dict(self.settings.engine),
            "without": list(self.settings.without),
        }
        [state] = self.client.post("/load", load, limit_s=LOAD_S)
        self.context = min(self.context, state["context"])
        return state

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """vLLM confirms the digest of every tensor that it was sent, and that it has loaded all of them, before it
        samples with them (contract 5)."""
        self.version = None
        try:
            update = self.updates.take(weights)
            header, size = update.header() | {"version": version}, wire.length(update.tensors)
            parts = wire.stream(update.tensors)
            answer = self.client.upload("/publish", header, parts, size, limit_s=self.settings.publish_s)
            self._unreported["publish/bytes"] = self._unreported.get("publish/bytes", 0.0) + size
            wrong = wire.first_difference(update.tensors, answer["held"]) or next(iter(answer["unused"]), None)
            if wrong is not None:
                raise RolloutError(
                    f"vLLM does not hold what was published as version {version}: the first tensor that differs is "
                    f"{wrong}"
                )
        except BaseException:
            self.updates.forget()
            raise
        self.version = version

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """One group per prompt, as `Engine.sample` gives them, with its errors. Raises RolloutError for parameters that
        vLLM cannot sample with, and where its server fails or is lost."""
        if self.version is None:
            raise RolloutError("vLLM has not confirmed the last publication: publish the weights again")
        self._check(params)
        reasons = [prompt_fault(prompt, params, self.policy.config.vocab_size, self.context) for prompt in prompts]
        faults = [reason for reason in reasons if reason]
        prompts = [prompt for prompt, reason in zip(prompts, reasons, strict=True) if not reason]
        groups = self._groups(prompts, params, on_finished) if prompts else []
        if fault := not_finite(groups):
            faults.append(fault)
        if faults:
            raise RolloutError("\n".join(faults), groups)
        return groups

    def _groups(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished | None
    ) -> list[RolloutGroup]:
        version, size, drafts = self.version, params.group_size, self.settings.draft_tokens
        assert version is not None
        job = {
            "version": version,
            "rows": [[p.token_ids, seed_of(params, p.prompt_id, sample)] for p in prompts for sample in range(size)],
            "temperature": params.temperature,
            "max_tokens": params.max_completion_tokens,
            "stop_token_ids": list(params.stop_token_ids),
        }
        found: list[dict[str, Any]] = []
        ended = 0
        for answer in self.client.post("/sample", job, limit_s=self.settings.silence_s):
            found = answer.get("completions", found)
            now = len(found) or answer["ended"]
            if on_finished and now > ended:
                on_finished(now - ended)
            ended = now
        if len(found) != size * len(prompts):
            raise RolloutError(f"vLLM at {self.client.url} gave {len(found)} completions, not {size * len(prompts)}")
        made = [completion_of(row, self.policy.tokenizer, version, drafts) for row in found]
        return [RolloutGroup(prompt, made[i * size : (i + 1) * size]) for i, prompt in enumerate(prompts)]

    def sample_on_each(self, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        return {"vLLM": self.sample(prompts, params)}

    def keep(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def held(self) -> dict[str, dict[str, tuple[str, str]]]:
        return {}  # `publish` has compared them

    def _check(self, params: SamplingParams) -> None:
        params.check()
        drafts, vocabulary = self.settings.draft_tokens, self.policy.config.vocab_size
        if (params.draft_tokens or 0) != drafts:
            raise RolloutError(
                f"draft_tokens={params.draft_tokens}: this vLLM was started with rollout.draft_tokens={drafts} and "
                "drafts at that depth only"
            )
        if params.record_routing:
            raise RolloutError(
                "learner.routing_replay: the experts that vLLM chose are not recorded; leave rollout.backend out"
            )
        if params.accept != "exact":
            raise RolloutError("accept=margin is our own engine's; vLLM verifies every draft")
        if params.stop_strings:
            raise RolloutError(f"stop={list(params.stop_strings)}: with vLLM completions end with stop tokens alone")
        for token in params.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"rollout.stop_token_ids: {token} is outside the vocabulary of {vocabulary} tokens")

    def use_costs(self, costs: CostTable | None, rows: int, lookups: bool = False) -> CostTable:
        raise RolloutError("vLLM drafts at one depth: with it rollout.draft_tokens is a number, or null for none")

    def metrics(self) -> dict[str, float]:
        found, self._unreported = self._unreported, {}
        return found

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


def _lost_elsewhere() -> str:
    return "See its log, start it again at the address in rollout.vllm.url, and go on with --resume auto"
