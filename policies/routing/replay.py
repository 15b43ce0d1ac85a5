"""Routing replay: a forward that uses the experts and attention heads of another one (R3, arXiv:2510.11370).

Sampler and learner round differently, so a router near a tie chooses another expert or attention head for the same
token. No importance ratio describes such a jump well. Replay keeps the choice; the weights of what was chosen are
computed again, so the router continues to learn.
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
    """Context in which the routers of these trunks choose `chosen_BTRk`; None changes nothing.

    `chosen_BTRk` [B, T, R, k], integers: what each of the trunk's R routers chooses for every token that the forward
    reads, in any order. First come the routers of experts by their layers, then those of dynamic heads. A router that
    chooses fewer than k has -1 after them. At -1 nothing was recorded, and the router chooses itself. The backward pass
    must be inside the context too, since gradient checkpointing runs the routers again.

    >>> with RoutingReplay([policy.trunk], torch.tensor([[[[0, 3]], [[-1, -1]]]])):     # two tokens, one MoE layer
    ...     loss(policy.hidden(token_ids, position_ids, segment)).backward()
    """

    def __init__(self, trunks: Iterable[nn.Module], chosen_BTRk: Tensor | None) -> None:
        self.chosen = chosen_BTRk
        self.routers = [[*routers(trunk).values(), *routers(trunk, "self_attn").values()] for trunk in trunks]
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        if self.chosen is None:
            return
        for of_trunk in self.routers:
            if len(of_trunk) != self.chosen.shape[2]:
                raise ValueError(
                    f"the recorded routing is of {self.chosen.shape[2]} routers, this policy has {len(of_trunk)}"
                )
            for r, router in enumerate(of_trunk):
                chosen = self.chosen[:, :, r, : router.top_k].flatten(0, 1).long()
                self.hooks.append(router.register_forward_hook(partial(_replay, chosen)))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def _replay(
    chosen_Nk: Tensor, router: DeepseekV3TopkRouter, inputs: object, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of what was chosen, as the router would give them (DeepSeek-V3, arXiv:2412.19437, eq. 13)."""
    logits, _, choice = output
    chosen = torch.where(chosen_Nk < 0, choice, chosen_Nk)
    weights = logits.sigmoid().gather(1, chosen)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * router.routed_scaling_factor, chosen
