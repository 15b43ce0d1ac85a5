"""How a policy samples under the options of a command."""

from __future__ import annotations

from grpo.config.sampling import SamplingOptions
from policies.policy import Policy
from rollout.sampling import SamplingParams


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
