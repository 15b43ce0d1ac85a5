"""What decodes: our absorbed MLA with its MTP head, or any causal LM of transformers. One engine serves both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
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
