"""What decodes: our absorbed MLA with its MTP head, or any causal LM of transformers. One engine serves both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policies.decoding.absorbed import AbsorbedTrunk
from policies.decoding.draft_head import AbsorbedHead
from policies.decoding.quantized import held_as
from policies.policy import Policy
from rollout.cost_table import CostTable
from rollout.sampling import PLAIN, Copies, DraftVocabulary

if TYPE_CHECKING:
    from rollout.backends.hf import HFTrunk
    from rollout.backends.stock import StockTrunk


class Cache(Protocol):
    """What a trunk keeps of the tokens that it has read, for each live row: a LatentCache, or a cache of HFTrunk or
    StockTrunk."""

    def advance(self, kept_R: Tensor, /) -> None: ...
    def select(self, rows: Tensor, /) -> None: ...
    def join(self, others: Sequence[Self], /) -> Self: ...


class Trunk(Protocol):
    """What reads tokens: an AbsorbedTrunk, an HFTrunk or a StockTrunk. Each has caches of its own kind."""

    device: torch.device

    def __call__(self, token_ids_BS: Tensor, position_ids_BS: Tensor, cache: Any, /) -> Tensor: ...
    def logits(self, hidden: Tensor, /) -> Tensor: ...
    def routing(self) -> Tensor: ...


@dataclass(frozen=True)
class Decoder:
    """All that a shard needs of an engine: what was derived from one version of the weights, and the settings.

    `context`: the most tokens of a sequence; `max_rows`: the most completions that are decoded together.
    """

    trunk: Any  # an AbsorbedTrunk or an HFTrunk; where experts are recorded, `routing()` gives those of the last call
    head: AbsorbedHead | None
    draft_vocabulary: DraftVocabulary | None
    tokenizer: PreTrainedTokenizerBase
    context: int
    version: int
    max_rows: int
    costs: CostTable | None
    graphs: list[Any] | None = None  # the engine's `compiled.rounds.Graphs`, once asked for; None: no graph can be


def derive(
    policy: Policy, dtype: torch.dtype, copies: Copies = PLAIN
) -> tuple[AbsorbedTrunk | HFTrunk | StockTrunk, AbsorbedHead | None]:
    """Trunk and draft head for decoding, derived from the weights that the policy has now."""
    if policy.backend == "transformers":
        if copies != PLAIN:
            raise ValueError(f"rollout.quantization={copies.trunk}: transformers' own forward has no matrices of ours")
        if policy.paths.sampler != "own":
            from rollout.backends.stock import StockTrunk

            return StockTrunk(policy, dtype), None
        from rollout.backends.hf import HFTrunk

        return HFTrunk(policy, dtype), None
    with held_as(copies.trunk):
        trunk = AbsorbedTrunk(policy.trunk, dtype, policy.max_length)
    if policy.mtp is None:
        return trunk, None
    with held_as(copies.drafts):
        return trunk, AbsorbedHead(policy.mtp, trunk, policy.draft_ids)
