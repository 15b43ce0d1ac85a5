"""The MTP loss on gold tokens, trained through the trunk as in DeepSeek-V3: for `quartet sft` only (contract 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.learner.batch import MicroBatch
from policies.logprobs import logprobs_from_hidden
from policies.policy import Policy


def gold_draft_loss(
    policy: Policy, preceding_BTD: Tensor, mini: MicroBatch, rows: Sequence[int], depth: int, chunk: int
) -> Tensor:
    """1/D Σ_d Σ_n −log P_d(token n + d) over the solutions of `rows` (DeepSeek-V3, eq. 24 and 25, before λ).

    `preceding_BTD[n]` is the trunk's hidden state that precedes token n; the gradient goes through it, the embeddings
    and the LM head. Returns the sum over tokens; divide by their number.
    """
    assert policy.mtp is not None
    chosen = list(rows)
    ids_BT, positions_BT, segment_BT = mini.token_ids[chosen], mini.position_ids[chosen], mini.segment[chosen]
    model = policy.trunk.get_decoder()
    embeddings = model.embed_tokens(ids_BT)
    outputs = policy.mtp.unroll(
        preceding_BTD[chosen],
        embeddings,
        lambda shift: model.rotary_emb(embeddings, positions_BT + shift),
        mini.head_visible[chosen],
        depth,
    )
    total = torch.zeros((), device=ids_BT.device)
    for d, output in enumerate(outputs, start=1):
        ahead = F.pad(segment_BT, (0, d))[:, d:]
        alive = (segment_BT > 0) & (ahead == segment_BT)
        gold = F.pad(ids_BT, (0, d))[:, d:][alive]
        if len(gold):
            logprobs, _ = logprobs_from_hidden(output[alive], policy.lm_head, gold, 1.0, chunk=chunk)
            total = total - logprobs.sum() / depth
    return total
