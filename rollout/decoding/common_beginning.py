"""What all prompts of a shard begin with, such as a system prompt, is read once, and each prompt goes on from a copy.

The learner's trees share it from the same number of tokens on (grpo/learner/tree.py). Prompts are read whole where they
are seen whole, by recurrent layers and indexers, by transformers' own caches, and where routing is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from policies.decoding.latent_cache import LatentCache
from rollout.backends import Decoder
from rollout.group import Prompt, common
from rollout.sampling import SamplingParams

SHARED = 128  # tokens; a forward of its own for fewer gains little


class Beginning:
    """The first `length` tokens of several prompts, of which each has more, and what the trunk made of them."""

    def __init__(self, trunk: Any, token_ids: Sequence[int]) -> None:
        self.length, self.trunk = len(token_ids), trunk
        self.cache = trunk.cache(1, self.length)
        ids_1T = torch.tensor([token_ids], device=trunk.device)
        self.hidden_1TD = trunk(ids_1T, torch.arange(self.length, device=trunk.device)[None], self.cache)

    def read(self, token_ids_PT: Tensor, lengths_P: Tensor, cache: Any) -> Tensor:
        """Reads what comes after it in each of these prompts. `cache` gets the entries of all of their tokens. Returns
        the states after them [P, T, D]."""
        if isinstance(cache, LatentCache):
            for entries_RTE, own_1TE in zip(cache.layers_RTE, self.cache.layers_RTE, strict=True):
                entries_RTE[:, : self.length] = own_1TE
            cache.advance(self.length)
            lengths_P = lengths_P - self.length
        else:
            cache.before = self.cache
        rest = token_ids_PT[:, self.length :]
        positions = torch.arange(self.length, token_ids_PT.shape[1], device=rest.device).expand_as(rest)
        hidden_PTD = self.trunk(rest, positions, cache)
        cache.advance(lengths_P)
        return torch.cat([self.hidden_1TD.expand(len(rest), -1, -1), hidden_PTD], dim=1)


def beginning_of(decoder: Decoder, prompts: Sequence[Prompt], params: SamplingParams) -> Beginning | None:
    """Reads what all of these prompts begin with. None where that is too little, or the trunk cannot go on from it."""
    trunk = decoder.trunk
    if len(prompts) < 2 or not getattr(trunk, "can_go_on", False) or params.record_routing:
        return None
    first, *others = [prompt.token_ids for prompt in prompts]
    length = reduce(lambda known, ids: min(common(first[:known], ids), len(ids) - 1), others, len(first) - 1)
    return Beginning(trunk, first[:length]) if length >= SHARED else None
