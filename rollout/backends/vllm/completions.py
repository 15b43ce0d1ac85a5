"""From our parameters to vLLM's requests, and from its answers to completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rollout.group import Completion, DraftStats, FinishReason
from rollout.sampling import SamplingParams, row_key


def seed_of(params: SamplingParams, prompt_id: str, sample: int) -> int:
    """From (run seed, step, draw, prompt, sample), as our own noise is keyed.

    >>> seed_of(SamplingParams(step=1), "a", 0) == seed_of(SamplingParams(step=2), "a", 0)
    False
    """
    high, low = row_key(params, prompt_id, sample)
    return ((high & 0x7FFFFFFF) << 32) | (low & 0xFFFFFFFF)


def completion_of(
    found: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, version: int, draft_tokens: int
) -> Completion:
    """`found`: a row as inside/quartet_server.py gives it. `abort` where a log-probability is not finite."""
    ids, logprobs, stopped = found["ids"], found["logprobs"], found["reason"] == "stop"
    reason: FinishReason = "stop" if stopped else "length"
    if not all(value is not None and math.isfinite(value) for value in logprobs):
        reason = "abort"
    text = str(tokenizer.decode(ids[:-1] if stopped else ids))
    stats = draft_stats(found["drafted"], found["accepted"], len(ids), draft_tokens)
    return Completion(ids, logprobs, text, reason, version, stats)


def draft_stats(drafted: Sequence[int], accepted: Sequence[int], tokens: int, depth: int) -> DraftStats:
    """From the drafts that were made and accepted in every forward after the first token; nothing without drafts.

    A forward gives the drafts that it accepts and one token of the trunk's own; what passes the end is not kept.

    >>> draft_stats([2, 2], [2, 1], tokens=5, depth=2).depths
    [0, 1, 2, 0, 1]
    """
    if not depth:
        return DraftStats(tokens - 1, depths=[0] * tokens)
    stats = DraftStats(drafted=[0] * depth, accepted=[0] * depth, depths=[0])
    for made, taken in zip(drafted, accepted, strict=True):
        room = tokens - len(stats.depths)
        if room <= 0:
            break
        stats.target_forwards += 1
        kept = min(taken, room)
        for at in range(made):
            stats.drafted[at] += 1
            stats.accepted[at] += at < kept
        stats.depths += [*range(1, kept + 1), 0][:room]
    return stats
