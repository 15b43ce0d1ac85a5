"""Routing replay: a forward that uses the experts that another one has chosen (R3, arXiv:2510.11370).

Sampler and learner round differently, so a router near a tie chooses other experts for the same token. No importance
ratio describes such a jump well. Replay keeps the choice; the weights of the experts are computed again, so the router
continues to learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from policies.routing.routers import routers


class RoutingReplay:
    """Context in which the routers of these trunks choose `experts_BTLk`; None changes nothing.

    `experts_BTLk` [B, T, L, k], integers: the k experts (in any order) of every token that the forward reads, at each
    of the trunk's L MoE layers in their order. At -1 nothing was recorded, and the router chooses itself. The backward
    pass must be inside the context too, since gradient checkpointing runs the routers again.

    >>> with RoutingReplay([policy.trunk], torch.tensor([[[[0, 3]], [[-1, -1]]]])):     # two tokens, one MoE layer
    ...     loss(policy.hidden(token_ids, position_ids, segment)).backward()
    """

    def __init__(self, trunks: Iterable[nn.Module], experts_BTLk: Tensor | None) -> None:
        self.experts = experts_BTLk
        self.routers = [list(routers(trunk).values()) for trunk in trunks]
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        if self.experts is None:
            return
        for of_trunk in self.routers:
            if len(of_trunk) != self.experts.shape[2]:
                raise ValueError(
                    f"the recorded routing has {self.experts.shape[2]} MoE layers, this policy has {len(of_trunk)}"
                )
            for layer, router in enumerate(of_trunk):
                chosen = self.experts[:, :, layer].flatten(0, 1).long()
                self.hooks.append(router.register_forward_hook(partial(_replay, chosen)))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def _replay(
    chosen_Nk: Tensor, router: DeepseekV3TopkRouter, inputs: object, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the chosen experts as the router would give them (DeepSeek-V3, arXiv:2412.19437, eq. 13)."""
    logits, _, own = output
    experts = torch.where(chosen_Nk < 0, own, chosen_Nk)
    weights = logits.sigmoid().gather(1, experts)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * router.routed_scaling_factor, experts
