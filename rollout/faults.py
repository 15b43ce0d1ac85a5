"""What goes wrong in sampling, in words that hold for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams

OnFinished = Callable[[int], None]  # gets the number of completions that have ended since it was last called


class RolloutError(RuntimeError):
    """Sampling cannot go on. The message names the prompt or the setting, and the way out.

    `groups` are those that were sampled all the same; completions of them that failed are marked `abort`.
    """

    def __init__(self, message: str, groups: Sequence[RolloutGroup] = ()) -> None:
        super().__init__(message)
        self.groups = list(groups)

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.groups)


def prompt_fault(prompt: Prompt, params: SamplingParams, vocabulary: int, limit: int) -> str | None:
    """Why this prompt cannot be continued within `limit` tokens, and the way out."""
    length = len(prompt.token_ids)
    if length == 0:
        return f"prompt {prompt.prompt_id!r} has no tokens; a policy continues at least one"
    if outside := [token for token in prompt.token_ids if not 0 <= token < vocabulary]:
        return (
            f"prompt {prompt.prompt_id!r} holds token {outside[0]}, outside the vocabulary of {vocabulary}; "
            "use the policy's own tokenizer"
        )
    if length + params.max_completion_tokens > limit:
        return (
            f"prompt {prompt.prompt_id!r} has {length} tokens; with rollout.max_completion_tokens="
            f"{params.max_completion_tokens} it passes the context of {limit}: shorten one of them"
        )
    return None


def not_finite(groups: Sequence[RolloutGroup]) -> str | None:
    """Says so where completions are marked `abort`, as those are whose logits are not finite."""
    failed = [g.prompt.prompt_id for g in groups if any(c.finish_reason == "abort" for c in g.completions)]
    if not failed:
        return None
    return (
        f"the policy's logits are not finite for completions of {len(failed)} of {len(groups)} prompts, "
        f"{failed[:4]}: the weights hold NaN or overflow; resume from an earlier checkpoint with a lower "
        "learner.learning_rate"
    )
