"""Dynamic heads in decoding: of every token some attention heads compute, see policies/routing/heads.py."""

from __future__ import annotations

import copy
import math

import torch.nn.functional as F
from torch import Tensor, nn

from policies.decoding.experts import route
from policies.decoding.latent_cache import LatentCache


class HeadChoice:
    """The router of a layer's attention heads, and attention by those that it chooses."""

    def __init__(self, router: nn.Module, active: int, shared: int) -> None:
        # The shared heads are chosen like the others: by a bias of infinity, with the weight of a logit of 0, 1.
        self.shared = shared
        self.gate = F.pad(router.weight.detach().float(), (0, 0, shared, 0))
        self.bias = F.pad(router.e_score_correction_bias.detach().float(), (shared, 0), value=math.inf)
        self.sizes = copy.copy(router.sizes)
        self.sizes.num_experts_per_tok = active

    def attend(self, h_BSD: Tensor, query_BSHK: Tensor, new_BSE: Tensor, cache: LatentCache, layer: int) -> Tensor:
        """Attends as `cache.attend` by the attention heads that the router chooses for `h_BSD`; the others give 0.
        Queries of all are one product before, since to gather rows of its matrix for each token would cost more."""
        batch, new, heads, width = query_BSHK.shape
        routed = route(F.linear(h_BSD.float().flatten(0, 1), self.gate), self.bias, self.sizes)
        self.chosen = routed[1]
        weights, chosen = (part_Nk.view(batch, new, -1, 1) for part_Nk in routed)
        out = cache.attend(layer, query_BSHK.gather(2, chosen.expand(-1, -1, -1, width)), new_BSE)
        out = out * weights.to(out.dtype)
        return out.new_zeros(batch, new, heads, out.shape[-1]).scatter(2, chosen.expand_as(out), out)

    def routed(self) -> Tensor:
        """Gives the attention heads of the router's last call [N, k], numbered after the shared ones from 0."""
        return self.chosen.sort(-1).values[:, self.shared :] - self.shared
