"""How a token is chosen: keyed noise, so that a sampled token is a function of its key and nothing else (contract 4).

token = argmax_v (logit_v / T + gumbel(key, position, v)): the Gumbel-max trick draws from softmax(logit / T) exactly,
and a draft that uses the same noise on its own logits often agrees with the trunk. Noise comes from hashing
(key, position, v), never from a stream, so that drafting, batching and retries cannot shift it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FULL_ROW = 1024  # vocabularies up to this size take noise for every token
TOP_K = 64  # larger ones for this many, and one noise for the rest of the vocabulary together


@dataclass(frozen=True)
class SamplingParams:
    """`temperature` 0 is greedy. `step` and `draw` are part of every noise key: a new step sees new noise."""

    group_size: int = 8
    temperature: float = 1.0
    max_completion_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    draft_tokens: int = 0
    step: int = 0
    draw: int = 0

    def at(self, step: int, draw: int = 0) -> SamplingParams:
        return replace(self, step=step, draw=draw)

    def check(self) -> None:
        """Raises ValueError naming the field, its value and what would work."""
        if self.group_size < 1:
            raise ValueError(f"rollout.group_size={self.group_size}: sample at least 1 completion per prompt")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"rollout.temperature={self.temperature}: use 0 (greedy) or a positive number")
        if self.max_completion_tokens < 1:
            raise ValueError(f"rollout.max_completion_tokens={self.max_completion_tokens}: use 1 or more")
        if self.draft_tokens < 0:
            raise ValueError(f"rollout.draft_tokens={self.draft_tokens}: use 0 (no drafts) or more")


def row_key(params: SamplingParams, prompt_id: str, sample: int) -> tuple[int, int]:
    """Two 32-bit words from (seed, step, draw, prompt, sample).

    >>> row_key(SamplingParams(seed=1), "a", 0) == row_key(SamplingParams(seed=1, draft_tokens=4), "a", 0)
    True
    """
    text = f"{params.seed}/{params.step}/{params.draw}/{sample}/{prompt_id}".encode()
    words = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(words[:4], "little", signed=True), int.from_bytes(words[4:], "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """A bijective hash of int32 with full avalanche (multiply and xor-shift; wraps on overflow), in place."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x735A2D97
    x ^= (x >> 15) & 0x1FFFF
    return x


def uniform(keys_N2: Tensor, positions_N: Tensor, ids: Tensor) -> Tensor:
    """Keyed uniforms in (0, 1), 23 bits each. `ids` [N, K] or [K]: which noises of each row; returns [N, K]."""
    place = positions_N.to(torch.int32)
    first = _mix(keys_N2[:, 0] + _mix(place * -1640531527))
    second = _mix(keys_N2[:, 1] ^ first)
    x = _mix(ids.to(torch.int32) * 0x3C6EF372 + first[:, None])
    x += second[:, None]
    x = _mix(x)
    # 23 bits and a half fit a float32 exactly; with 24 the largest would round to 1, an infinite Gumbel noise.
    return (((x >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23


def gumbel(keys_N2: Tensor, positions_N: Tensor, ids: Tensor) -> Tensor:
    return uniform(keys_N2, positions_N, ids).log_().neg_().log_().neg_()


def choose(logits_NV: Tensor, temperature: float, keys_N2: Tensor, positions_N: Tensor) -> Tensor:
    """Sampled token ids [N]. `positions_N` counts from the completion's first token.

    In a large vocabulary only the TOP_K logits get a noise of their own. The maximum of all other perturbed logits is
    itself Gumbel distributed around their logsumexp: one keyed noise decides whether the tail wins, a keyed uniform
    then picks inside it. Exact for softmax(logits / T), at a fraction of the cost.
    """
    if temperature == 0:
        return logits_NV.argmax(-1)
    scaled = logits_NV.float() / temperature
    vocabulary = scaled.shape[1]
    if vocabulary <= FULL_ROW:
        ids = torch.arange(vocabulary, device=scaled.device)
        return (scaled + gumbel(keys_N2, positions_N, ids)).argmax(-1)
    top, ids = scaled.topk(TOP_K, dim=-1, sorted=False)
    rest = scaled.scatter_(1, ids, float("-inf"))  # its logsumexp is exact where it is tiny, a difference would not be
    tail_id, pick_id = torch.tensor([[-1], [-2]], device=rest.device)
    tail = rest.logsumexp(-1) + gumbel(keys_N2, positions_N, tail_id)[:, 0]
    best, where = (top + gumbel(keys_N2, positions_N, ids)).max(-1)
    tokens = ids.gather(1, where[:, None])[:, 0]
    rows = (tail > best).nonzero()[:, 0]
    if len(rows):
        reached = rest[rows].double().softmax(-1).cumsum(-1)
        pick = uniform(keys_N2[rows], positions_N[rows], pick_id).double() * reached[:, -1:]
        tokens[rows] = torch.searchsorted(reached, pick, right=True)[:, 0]
    return tokens


def logprobs_of(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
    """Log-probability of the chosen tokens [N] under softmax(logits / T); greedy is scored at T = 1."""
    scaled = logits_NV.float() / (temperature or 1.0)
    return scaled.gather(1, tokens_N[:, None])[:, 0] - scaled.logsumexp(-1)
