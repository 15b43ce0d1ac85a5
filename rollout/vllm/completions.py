"""From our parameters to vLLM's requests, and from its answers to completions, of one turn or of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from rollout.group import Completion, DraftStats, FinishReason, Prompt
from rollout.sampling import SamplingParams, row_key


def seed_of(params: SamplingParams, prompt_id: str, sample: int, at: int = 0) -> int:
    """The seed of a turn, from (run seed, step, draw, prompt, sample), as our own noise is keyed, and the length `at`
    which the turn begins.

    >>> seed_of(SamplingParams(step=1), "a", 0) == seed_of(SamplingParams(step=2), "a", 0)
    False
    """
    high, low = row_key(params, prompt_id, sample)
    first = ((high & 0x7FFFFFFF) << 32) | (low & 0xFFFFFFFF)
    return (first + at * 0x9E3779B97F4A7C15) % 2**63


@dataclass
class Row:
    """One completion as it grows: what vLLM has sampled in each turn, and what tools wrote between two of them.

    vLLM knows no episodes. It reads the prompt and all that followed anew in every turn, from its prefix cache.
    """

    prompt: Prompt
    sample: int
    draft_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason = "length"
    draft: DraftStats = field(default_factory=DraftStats)

    def request(self, params: SamplingParams) -> list[Any]:
        """Gives what is sampled next: its token ids, its seed, and the most tokens."""
        sample = self.prompt.first_sample + self.sample
        seed = seed_of(params, self.prompt.prompt_id, sample, params.start + len(self.ids))
        return [[*self.prompt.token_ids, *self.ids], seed, params.max_completion_tokens - len(self.ids)]

    def add(self, turn: Mapping[str, Any]) -> None:
        """Adds a turn as inside/quartet_server.py gives it. `abort` where a log-probability is not finite."""
        ids, logprobs = turn["ids"], turn["logprobs"]
        finite = all(value is not None and math.isfinite(value) for value in logprobs)
        self.reason = ("stop" if turn["reason"] == "stop" else "length") if finite else "abort"
        self.ids, self.logprobs = self.ids + ids, self.logprobs + logprobs
        self._add_drafts(draft_stats(turn["drafted"], turn["accepted"], len(ids), self.draft_tokens))

    def _add_drafts(self, draft: DraftStats) -> None:
        self.draft.target_forwards += draft.target_forwards
        self.draft.drafted = list(map(sum, zip_longest(self.draft.drafted, draft.drafted, fillvalue=0)))
        self.draft.accepted = list(map(sum, zip_longest(self.draft.accepted, draft.accepted, fillvalue=0)))
        self.draft.depths += draft.depths

    def write(self, ids: Sequence[int]) -> None:
        """Adds what tools wrote after the turn."""
        self.ids, self.logprobs = [*self.ids, *ids], self.logprobs + [0.0] * len(ids)
        self.draft.depths += [0] * len(ids)

    def completion(self, tokenizer: PreTrainedTokenizerBase, version: int, temperature: float) -> Completion:
        text = str(tokenizer.decode(self.ids[:-1] if self.reason == "stop" else self.ids))
        completion = Completion(self.ids, self.logprobs, text, self.reason, version, self.draft)
        completion.temperature = temperature
        return completion


def draft_stats(drafted: Sequence[int], accepted: Sequence[int], tokens: int, depth: int) -> DraftStats:
    """Counts the drafts that were made and accepted in every forward after the first token; nothing without drafts.

    A forward gives the drafts that it accepts and one token of the trunk's own; what passes the end is not kept.

    >>> draft_stats([2, 2], [2, 1], tokens=5, depth=2).depths
    [0, 1, 2, 0, 1]
    """
    if not depth:
        return DraftStats(tokens - 1, depths=[0] * tokens)
    stats = DraftStats(drafted=[0] * depth, accepted=[0] * depth, depths=[0])
    for made, right in zip(drafted, accepted, strict=True):
        room = tokens - len(stats.depths)
        if room <= 0:
            break
        stats.target_forwards += 1
        count = min(right, room)
        for at in range(made):
            stats.drafted[at] += 1
            stats.accepted[at] += at < count
        stats.depths += [*range(1, count + 1), 0][:room]
    return stats
