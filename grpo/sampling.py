"""How a policy samples under the options of a command."""

from __future__ import annotations

from grpo.config.environment import EnvironmentOptions
from grpo.config.sampling import SamplingOptions
from policies.policy import Policy
from rollout.sampling import EnvironmentSpec, SamplingParams


def sampling_params(policy: Policy, options: SamplingOptions, group_size: int, seed: int) -> SamplingParams:
    """How `policy` samples under these options: its own stop tokens, drafts where it has a head for them.

    vLLM has nothing that chooses their number: null is none there.
    """
    chosen = policy.mtp is not None and getattr(options, "backend", None) != "vllm"
    return SamplingParams(
        group_size=group_size,
        temperature=options.temperature,
        max_completion_tokens=options.max_completion_tokens,
        stop_token_ids=tuple(policy.stop_token_ids),
        seed=seed,
        draft_tokens=options.draft_tokens if chosen else options.draft_tokens or 0,
        accept=options.accept,
    )


def environment_of(options: object) -> EnvironmentSpec | None:
    """What the policy acts in under the options of a command; None without tools, and for commands without them."""
    if not isinstance(options, EnvironmentOptions) or not options.has_tools:
        return None
    given = options.environment or {}
    environments = {"": given} if isinstance(given, str) else given
    return EnvironmentSpec(
        tools=tuple(options.tools),
        environments=tuple(environments.items()),
        max_turns=options.max_turns,
        timeout_s=options.tool_timeout_s,
        workers=options.tool_workers,
    )
