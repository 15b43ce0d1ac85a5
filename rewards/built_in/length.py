"""Penalties on length and repetition, counted in tokens. They are at most 0; add them to a correctness reward."""

from __future__ import annotations

from rewards.protocol import right_at


@right_at(None)
def length_penalty(
    prompts: list | None,
    completions: list,
    completion_ids: list[list[int]],
    target: int,
    per_token: float = 0.0003,
    exact: bool = False,
    **_,
) -> list[float]:
    """Gives `-per_token * max(0, length - target)`, or with `exact` `-per_token * |length - target|`.

    The exact form is the length term of LCPO-Exact (Aggarwal & Welleck, L1, 2025, eq. 1; their alpha is 0.0003).

    >>> length_penalty(None, ["...", "..."], completion_ids=[[7] * 120, [7] * 90], target=100, per_token=0.01)
    [-0.2, 0.0]
    """
    excess = [len(ids) - target for ids in completion_ids]
    return [-per_token * (abs(tokens) if exact else max(0, tokens)) + 0.0 for tokens in excess]


@right_at(None)
def repetition_penalty(
    prompts: list | None,
    completions: list,
    completion_ids: list[list[int]],
    ngram: int = 3,
    max_penalty: float = -1.0,
    **_,
) -> list[float]:
    """Gives `max_penalty * (1 - distinct n-grams / n-grams)` (Yeo et al., Demystifying Long CoT, 2025, app. C.2).

    A completion shorter than one n-gram scores 0.

    >>> repetition_penalty(None, ["...", "..."], completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]], ngram=2)
    [0.0, -0.75]
    """
    if ngram < 1 or max_penalty > 0:
        raise ValueError(f"ngram={ngram}, max_penalty={max_penalty}: use ngram >= 1 and max_penalty <= 0")
    rewards = []
    for ids in completion_ids:
        ngrams = list(zip(*(ids[start:] for start in range(ngram)), strict=False))
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        rewards.append(max_penalty * repeated + 0.0)
    return rewards


@right_at(None)
def soft_overlong_punishment(
    prompts: list | None, completions: list, completion_ids: list[list[int]], max_length: int, cache_length: int, **_
) -> list[float]:
    """Gives 0 up to `max_length - cache_length` tokens, then falls to -1 at `max_length` (DAPO, Yu et al. 2025, eq.
    13).

    >>> soft_overlong_punishment(None, ["..."], completion_ids=[[7] * 90], max_length=100, cache_length=20)
    [-0.5]
    """
    if not 0 <= cache_length <= max_length:
        raise ValueError(f"cache_length={cache_length} must be between 0 and max_length={max_length}")
    free = max_length - cache_length
    return [
        0.0 if len(ids) <= free else -1.0 if len(ids) > max_length else (free - len(ids)) / cache_length
        for ids in completion_ids
    ]
