"""Decoding of a Llama-form model (multi-head or grouped-query attention) as plain tensors: the peer of `AbsorbedTrunk`.

Built with the same means (fused projections, one preallocated cache, batched matrix products, fp32 softmax), so that
the two differ in their attention alone. Rows are of one length here, which spares this side the ragged masks.
Axes: R rows, G key/value heads, Q query heads of each, T cached tokens, K head dimension, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from policies.decoding.absorbed import RotaryTable, rotate


class MultiHeadBlock:
    """One decoder layer."""

    def __init__(self, layer: torch.nn.Module, config, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.groups, self.head, self.eps = config.num_key_value_heads, attention.head_dim, config.rms_norm_eps
        self.queries = config.num_attention_heads // self.groups
        query = attention.q_proj.weight.detach() * attention.scaling
        self.qkv = torch.cat([query, attention.k_proj.weight.detach(), attention.v_proj.weight.detach()]).to(dtype)
        self.out = attention.o_proj.weight.detach().to(dtype)
        self.gate_up = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]).to(dtype)
        self.down = mlp.down_proj.weight.detach().to(dtype)
        self.input_norm = layer.input_layernorm.weight.detach().to(dtype)
        self.post_norm = layer.post_attention_layernorm.weight.detach().to(dtype)

    def __call__(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, at: int) -> Tensor:
        """[R, D] -> [R, D]; writes position `at` of keys and values [R, G, T, K] and attends to all up to it."""
        rows, hidden = x_RD.shape
        h = F.rms_norm(x_RD, (hidden,), self.input_norm, self.eps)
        qkv = F.linear(h, self.qkv).view(rows, self.groups * (self.queries + 2), self.head)
        query, key, value = qkv.split([self.groups * self.queries, self.groups, self.groups], dim=1)
        query, keys[:, :, at], values[:, :, at] = rotate(query, *rope), rotate(key, *rope), value
        query = query.view(rows, self.groups, self.queries, self.head)
        scores = (query @ keys[:, :, : at + 1].transpose(2, 3)).float()
        attended = scores.softmax(-1).to(x_RD.dtype) @ values[:, :, : at + 1]
        x = x_RD + F.linear(attended.reshape(rows, -1), self.out)
        gate, up = F.linear(F.rms_norm(x, (hidden,), self.post_norm, self.eps), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class MultiHeadDecoder:
    """The whole model, one token a row and step."""

    def __init__(self, model: LlamaForCausalLM, dtype: torch.dtype, length: int) -> None:
        config = self.config = model.config
        if config.attention_bias or config.mlp_bias:
            raise ValueError("attention_bias and mlp_bias: this decoder has no biases; use a model without them")
        self.embedding = model.model.embed_tokens.weight.detach().to(dtype)
        self.head = model.lm_head.weight.detach().to(dtype)
        self.norm, self.eps = model.model.norm.weight.detach().to(dtype), config.rms_norm_eps
        self.blocks = [MultiHeadBlock(layer, config, dtype) for layer in model.model.layers]
        self.rope = RotaryTable(model.model.rotary_emb, length, dtype, self.embedding.device)

    def start(self, rows: int, context: int, room: int) -> None:
        """Rows that stand behind `context` tokens of noise, and room for more."""
        shape = (len(self.blocks), rows, self.blocks[0].groups, context + room, self.blocks[0].head)
        device, dtype = self.embedding.device, self.embedding.dtype
        self.keys, self.values = (torch.randn(shape, device=device).to(dtype) for _ in "kv")
        self.length = context

    def step(self, token_ids_R: Tensor) -> Tensor:
        """Logits [R, V] of the next token."""
        rope = self.rope(torch.tensor(self.length, device=token_ids_R.device))
        x = F.embedding(token_ids_R, self.embedding)
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            x = block(x, rope, keys, values, self.length)
        self.length += 1
        return F.linear(F.rms_norm(x, (x.shape[-1],), self.norm, self.eps), self.head)
