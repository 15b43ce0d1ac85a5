"""Absorbed MLA: decoding over the latent cache as attention with one key/value head (DeepSeek-V2, section 2.1.2).

`kv_b_proj` expands a latent c into keys W_uk c and values W_uv c of every head. Since q·(W_uk c) = (W_ukᵀ q)·c, and the
attended value is W_uv (Σ p c), neither needs to be expanded: queries are mapped into the latent space, and only the
result is mapped back. Everything here is derived from a policy's weights and is rebuilt when they change (contract 5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from policies.attention import sees_prompts_whole
from policies.decoding.dynamic_heads import HeadChoice
from policies.decoding.experts import held, route, run_experts
from policies.decoding.latent_cache import LatentCache
from policies.decoding.linear import FixedLinear


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + d/2]). `cos` and `sin` are those of `RotaryTable`."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


class RotaryTable:
    """The tables [cos | cos] and [-sin | sin] of every position [T, rope], made once by the policy's rotary module."""

    def __init__(self, rotary: torch.nn.Module, length: int, dtype: torch.dtype, device: torch.device) -> None:
        positions = torch.arange(length, device=device)[None]
        cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half], sin[0, :, :half]
        self.cos, self.sin = torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids], self.sin[position_ids]


class AbsorbedBlock:
    """One decoder layer as plain tensors: fused projections, absorbed attention, dense or expert feed-forward."""

    run_experts = staticmethod(run_experts)

    def __init__(self, layer: DeepseekV3DecoderLayer, config: DeepseekV3Config, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self.config = config
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.rope, self.nope = config.qk_rope_head_dim, config.qk_nope_head_dim
        self.eps = config.rms_norm_eps
        self.input_norm = layer.input_layernorm.weight.detach().to(dtype)
        self.post_norm = layer.post_attention_layernorm.weight.detach().to(dtype)
        self.kv_norm = attention.kv_a_layernorm.weight.detach().to(dtype)
        self.kv_eps = attention.kv_a_layernorm.variance_epsilon
        self.choice = None
        if (router := getattr(attention, "gate", None)) is not None:
            self.choice = HeadChoice(router, config.active_heads, config.shared_heads)
        self._absorb(attention, dtype)
        self._take_feed_forward(layer.mlp, dtype)

    def _absorb(self, attention: torch.nn.Module, dtype: torch.dtype) -> None:
        heads, rank, nope = self.heads, self.rank, self.nope
        expand = attention.kv_b_proj.weight.detach().view(heads, -1, rank).float()
        up_key, up_value = expand[:, :nope], expand[:, nope:]
        kv_weight = attention.kv_a_proj_with_mqa.weight.detach().float()
        kv_bias = attention.kv_a_proj_with_mqa.bias
        biased = kv_bias is not None  # also where it is zero, since a later publication's may not be
        last = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
        query = last.weight.detach().float().view(heads, nope + self.rope, -1) * attention.scaling
        if self.config.rope_interleave:
            # Pairs (2i, 2i+1) become (i, i + d/2), which is the same rotation without strided reads at every step.
            halves = torch.cat([torch.arange(0, self.rope, 2), torch.arange(1, self.rope, 2)])
            query = torch.cat([query[:, :nope], query[:, nope:][:, halves]], dim=1)
            kv_weight = torch.cat([kv_weight[:rank], kv_weight[rank:][halves]])
            if kv_bias is not None:
                kv_bias = torch.cat([kv_bias[:rank], kv_bias[rank:][halves]])
        # Folding W_uk into the query projection saves an operation but costs FLOPs; so does folding W_uv into o_proj.
        width = query.shape[-1]
        self.up_key = up_key.to(dtype) if nope else None
        if nope and rank * width <= 1.5 * nope * (width + rank):
            query = torch.cat([up_key.transpose(1, 2) @ query[:, :nope], query[:, nope:]], dim=1)
            self.up_key = None
        query = query.flatten(0, 1)
        kv_bias = torch.zeros(len(kv_weight)) if kv_bias is None else kv_bias.detach().float()
        if attention.q_lora_rank is None:
            first, first_bias, self.query, self.query_norm = query, torch.zeros(len(query)), None, None
        else:
            first, self.query = attention.q_a_proj.weight.detach().float(), FixedLinear(query.to(dtype))
            bias = attention.q_a_proj.bias
            first_bias = torch.zeros(len(first)) if bias is None else bias.detach().float()
            self.query_norm = attention.q_a_layernorm.weight.detach().to(dtype)
            self.query_eps = attention.q_a_layernorm.variance_epsilon
        into_bias = torch.cat([first_bias.to(kv_bias.device), kv_bias]).to(dtype)
        self.into = FixedLinear(torch.cat([first, kv_weight]).to(dtype), into_bias if biased else None)
        self.split = [len(first), len(kv_weight)]

        out = attention.o_proj.weight.detach().float()
        hidden, value = out.shape[0], up_value.shape[1]
        self.up_value = up_value.transpose(1, 2).contiguous().to(dtype)
        if rank * hidden <= 1.5 * value * (rank + hidden):
            out = torch.einsum("dhv,hvr->dhr", out.view(hidden, heads, value), up_value).reshape(hidden, -1)
            self.up_value = None
        out_bias = None if attention.o_proj.bias is None else attention.o_proj.bias.detach().to(dtype)
        self.out = FixedLinear(out.to(dtype), out_bias)

    def _take_feed_forward(self, mlp: torch.nn.Module, dtype: torch.dtype) -> None:
        dense = mlp
        self.gate = None
        if hasattr(mlp, "experts"):
            self.gate = mlp.gate.weight.detach().float()
            self.gate_bias = mlp.gate.e_score_correction_bias.detach().float().clone()
            self.gate_up = held(mlp.experts.gate_up_proj.detach().to(dtype))
            self.down = held(mlp.experts.down_proj.detach().to(dtype))
            dense = mlp.shared_experts
        gate_up = torch.cat([dense.gate_proj.weight.detach(), dense.up_proj.weight.detach()])
        self.dense_gate_up = FixedLinear(gate_up.to(dtype))
        self.dense_down = FixedLinear(dense.down_proj.weight.detach().to(dtype))

    def __call__(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], cache: LatentCache, layer: int) -> Tensor:
        """Computes [B, S, D] -> [B, S, D], and appends S vectors to each row of the planned cache. `rope` is cos and
        sin, [B, S, rope] each."""
        cos, sin = rope
        batch, new, hidden = x_BSD.shape
        h = F.rms_norm(x_BSD, (hidden,), self.input_norm, self.eps)
        query, latent = self.into(h).split(self.split, dim=-1)
        if self.query is not None:
            query = F.rms_norm(query, (query.shape[-1],), self.query_norm, self.query_eps)
            query = self.query(query)
        query = query.view(batch, new, self.heads, -1)
        rotated = rotate(query[..., query.shape[-1] - self.rope :], cos[:, :, None], sin[:, :, None])
        if self.nope:
            unrotated = query[..., : query.shape[-1] - self.rope]
            if self.up_key is not None:
                unrotated = torch.einsum("bshn,hnr->bshr", unrotated, self.up_key)
            rotated = torch.cat([unrotated, rotated], dim=-1)
        vector = torch.cat(
            [
                F.rms_norm(latent[..., : self.rank], (self.rank,), self.kv_norm, self.kv_eps),
                rotate(latent[..., self.rank :], cos, sin),
            ],
            dim=-1,
        )
        if self.choice is None:
            attended = cache.attend(layer, rotated, vector)
        else:
            attended = self.choice.attend(h, rotated, vector, cache, layer)
        if self.up_value is not None:
            attended = torch.einsum("bshr,hrv->bshv", attended, self.up_value)
        x = x_BSD + self.out(attended.flatten(2))
        h = F.rms_norm(x, (hidden,), self.post_norm, self.eps).view(-1, hidden)
        return x + self.feed_forward(h).view_as(x)

    def feed_forward(self, h_ND: Tensor) -> Tensor:
        """The dense part, or the shared expert and the chosen ones: [N, D] -> [N, D]."""
        gate, up = self.dense_gate_up(h_ND).chunk(2, dim=-1)
        dense = self.dense_down(F.silu(gate) * up)
        if self.gate is None:
            return dense
        weights, self.experts = route(F.linear(h_ND.float(), self.gate), self.gate_bias, self.config)
        return dense + self.run_experts(h_ND, weights, self.experts, self.gate_up, self.down)


class AbsorbedTrunk:
    """The whole trunk for decoding. Adapters of `trunk` must be merged already."""

    def __init__(self, trunk: torch.nn.Module, dtype: torch.dtype, length: int) -> None:
        config, model = trunk.config, trunk.model
        self.both_ways = sees_prompts_whole(config)
        self.can_go_on = not self.both_ways  # after a beginning that was read alone
        self.config, self.dtype = config, dtype
        self.device: torch.device = model.embed_tokens.weight.device
        self.embedding = model.embed_tokens.weight.detach().to(dtype)
        self.head = trunk.lm_head.weight.detach().to(dtype)
        self.logits = FixedLinear(self.head)  # [..., D] -> [..., V]
        self.norm = model.norm.weight.detach().to(dtype)
        self.blocks = [AbsorbedBlock(layer, config, dtype) for layer in model.layers]
        self.rope = RotaryTable(model.rotary_emb, length, dtype, self.device)

    def cache(self, rows: int, capacity: int, prompts_R: Tensor | None = None) -> LatentCache:
        """An empty cache of the trunk. `prompts_R`: the lengths of the prompts that are read first, if they are."""
        cache = self.cache_of(len(self.blocks), rows, capacity)
        cache.whole_R = prompts_R if self.both_ways else None
        return cache

    def cache_of(self, layers: int, rows: int, capacity: int, first: int = 0) -> LatentCache:
        """An empty cache of so many layers like the trunk's."""
        rank = self.config.kv_lora_rank
        shape = layers, rows, capacity, rank + self.config.qk_rope_head_dim
        return LatentCache(shape, rank, dtype=self.dtype, device=self.device, first=first)

    def __call__(self, token_ids_BS: Tensor, position_ids_BS: Tensor, cache: LatentCache) -> Tensor:
        """Final hidden states [B, S, D], after the last norm."""
        cache.plan(token_ids_BS.shape[1])
        rope = self.rope(position_ids_BS)
        x = F.embedding(token_ids_BS, self.embedding)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, cache, layer)
        return F.rms_norm(x, (x.shape[-1],), self.norm, self.config.rms_norm_eps)

    @property
    def has_routers(self) -> bool:
        return any(block.gate is not None or block.choice is not None for block in self.blocks)

    def routing(self) -> Tensor:
        """Gives what the routers chose in the last call, [B · S, routers, k], in the order of `RoutingReplay`."""
        chosen = [block.experts for block in self.blocks if block.gate is not None]
        chosen += [block.choice.routed() for block in self.blocks if block.choice is not None]
        most = max(part_Nk.shape[1] for part_Nk in chosen)
        return torch.stack([F.pad(part_Nk, (0, most - part_Nk.shape[1]), value=-1) for part_Nk in chosen], dim=1)
