"""How a policy samples under the options of a command, and what it acts in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo.config.environment import AgentOptions, EnvironmentOptions
from grpo.config.sampling import AnswerOptions, RolloutOptions, SamplingOptions
from grpo.learner.row import PackedRow
from policies import devices
from policies.policy import Policy
from rollout.cost_table import GRAPH_DEPTHS
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import EnvironmentSpec, SamplingParams

FEWEST_ROUNDS = 100_000  # in which graphs gain three times what they took to compile, .35 ms a layer and round
TURN_TIMEOUT_S = 10.0  # of the calls of one turn, where the options do not say


def sampling_params(
    policy: Policy,
    options: SamplingOptions,
    group_size: int,
    seed: int,
    *,
    rounds: int = 0,
) -> SamplingParams:
    """Tells how `policy` samples under these options: its own stop tokens, drafts where it has something to draft from.

    vLLM has nothing that chooses their number: null is none there. `rounds` with few rows are planned: many of them are
    decoded by compiled graphs. Raises ValueError for `compile: on` where no graph can decode.
    """
    chosen = policy.mtp is not None and getattr(options, "backend", None) != "vllm"
    params = SamplingParams(
        group_size=group_size,
        temperature=options.temperature,
        max_completion_tokens=options.max_completion_tokens,
        stop_token_ids=tuple(policy.stop_token_ids),
        seed=seed,
        draft_tokens=options.draft_tokens if chosen else options.draft_tokens or 0,
    )
    if isinstance(options, AnswerOptions) and options.lossy_margin is not None:
        params = replace(params, accept="margin", margin=options.lossy_margin)
    fewest = FEWEST_ROUNDS * (1 if params.draft_tokens is not None else len(GRAPH_DEPTHS))
    if rounds < fewest and not _compiles(options):
        return params
    why = no_graph(policy.backend == "native", policy.device, options)
    if why and _compiles(options):
        raise ValueError(f"compile=on: {why}, so no graph can decode; leave it out")
    return replace(params, compiled=not why)


def _compiles(options: SamplingOptions) -> bool:
    return isinstance(options, AnswerOptions) and options.compile == "on"


def no_graph(native: bool, device: torch.device, options: SamplingOptions) -> str | None:
    """Says why no graph can decode a policy that is `native` to our engine or not; None where one can."""
    if not native or getattr(options, "backend", None) == "vllm":
        return "this policy is not decoded by our own engine"
    if devices.has_cuda(device):
        if not _compiles(options):
            return "no GPU has told yet what recorded rounds gain"
    elif device.type != "cpu":
        return f"the policy is on {device.type}, where nobody has tried it"
    elif shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        return f"there is no C++ compiler ({compiler})"
    if isinstance(options, RolloutOptions) and options.quantization != "none":
        return "a graph has no matrices of fewer bits"
    if isinstance(options, AnswerOptions) and options.lossy_margin is not None:
        return f"rollout.lossy_margin={options.lossy_margin} takes drafts unverified"
    return None


def environment_of(options: object) -> EnvironmentSpec | None:
    """Gives what the policy acts in under these options; None without tools, and for commands without them."""
    if not isinstance(options, EnvironmentOptions) or not options.has_tools:
        return None
    classes = options.environment or {}
    environments = {"": classes} if isinstance(classes, str) else classes
    return EnvironmentSpec(
        tools=tuple(options.tools),
        environments=tuple(environments.items()),
        max_turns=options.max_turns,
        timeout_s=options.program_timeout_s or TURN_TIMEOUT_S,
        memory_mb=options.program_memory_mb,
    )


def agent_of(options: object) -> AgentOptions | None:
    """The agent under the options of a command; None without one, and for commands that have none."""
    return options if isinstance(options, AgentOptions) and options.agent else None


class Actor:
    """The environment or agent of a run as its task sees it; here there is neither, see acting.py."""

    environment: EnvironmentSpec | None = None
    agent: AgentOptions | None = None
    columns: Sequence[str] = ()  # that it adds to those of the data

    def added(self, columns: Sequence[Mapping[str, Any]], groups: Sequence[RolloutGroup]) -> list[Mapping[str, Any]]:
        """The columns of each group, with what the environments or the agents gave."""
        return list(columns)

    def solution(self, prompt: Prompt, marked: str, tokenizer: PreTrainedTokenizerBase, stop: int) -> PackedRow | None:
        """A solution as an episode to learn from; None: it is a text."""
        return None

    def begun_prompt(
        self,
        prompt: Prompt,
        messages: list[dict[str, Any]] | None,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
    ) -> Prompt:
        """The prompt as its episodes began, from the messages that were recorded of it."""
        return prompt
