"""The multi-token prediction head (DeepSeek-V3, eq. 21–23): one module that is applied recurrently to any depth.

An entry n of the draft head combines the hidden state that precedes token n with the embedding of token n, and predicts
token n + 1. Depth 1 takes the trunk's hidden states. Depth d continues a chain: it takes the previous depth's output
instead and embeds token n + d − 1. In training and in drafting alike, an entry attends to

    depth 1   every depth-1 entry of the same sequence up to its own,
    depth d   whatever its chain's depth-1 entry attends to, and the chain's own entries at depths 2 … d.

For drafting this is one cache: verified tokens add depth-1 entries, and a chain is appended and rolled back. Released
code concatenates [embedding; hidden] before `eh_proj`, the reverse of the paper's text, and so do we.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from policies.attention import Packing, packed_attention

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

Divergence = Literal["kl", "tv"]
DEPTH_DECAY = 0.6  # weight of depth d in the draft loss ∝ 0.6^(d-1) (FastMTP)


class MTPHead(nn.Module):
    """The draft head: norms, a projection and one decoder layer, which is MoE like the trunk's last layers, or dense if
    the trunk has no experts. Embedding, rotary module and LM head are the trunk's."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config = copy.deepcopy(config)
        self.config.first_k_dense_replace = int(config.first_k_dense_replace >= config.num_hidden_layers)
        self.enorm = DeepseekV3RMSNorm(hidden, eps=eps)
        self.hnorm = DeepseekV3RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.block = DeepseekV3DecoderLayer(self.config, 0)
        self.norm = DeepseekV3RMSNorm(hidden, eps=eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw linear and expert weights from N(0, initializer_range) and set biases to 0; norms are 1 already."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            elif name.endswith("bias"):
                parameter.zero_()

    def cast(self, dtype: torch.dtype) -> MTPHead:
        """Cast in place, see `cast_in_place`."""
        cast_in_place(self, dtype)
        return self

    def enter(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """The block's input of entries, from the embeddings of their tokens and the hidden states before them."""
        return self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(hidden)], dim=-1))

    def unroll(
        self,
        hidden_BTD: Tensor,
        embeddings_BTD: Tensor,
        rope: Callable[[int], tuple[Tensor, Tensor]],
        segment_BT: Tensor,
        depth: int,
        first: int = 0,
        until_BT: Tensor | None = None,
        given: Packing | None = None,
    ) -> list[Tensor]:
        """Outputs [B, T, D] of depths 1 … depth, for every entry n of a row at once.

        `hidden_BTD[n]` is the trunk's hidden state that precedes token n, `embeddings_BTD[n]` embeds token n, and
        `rope(s)` gives cos and sin of every entry's position plus s. Entries attend as tokens of a `Packing` with this
        `segment_BT` and `until_BT` do: the first token of a row has no entry, since nothing precedes it, so it counts
        as padding. In a prefix-LM too: what entries of a prompt attend to changes their own outputs alone, which
        nothing reads. If no `given` packing has `segment_BT` and `until_BT` in the host's memory, a device may be
        waited for.
        Output d of entry n has a meaning if tokens n … n + d − 1 follow each other in one sequence, whose end the
        caller knows. No chain starts before entry `first`, such as inside a prompt: earlier entries are attended to,
        and their outputs are zero.
        """
        outputs: list[Tensor] = []
        chain: list[tuple[Tensor, Tensor]] = []
        packing = Packing(segment_BT, first, until=until_BT, given=given)
        previous = hidden_BTD
        for d in range(1, depth + 1):
            start = first if d > 1 else 0
            shifted = F.pad(embeddings_BTD, (0, 0, 0, d - 1))[:, d - 1 + start :]
            x = self.enter(shifted, previous)
            cos, sin = rope(d - 1)
            query, key, value = self._project(self.block.input_layernorm(x), cos[:, start:], sin[:, start:])
            if d == 1:
                base = key, value
                x, query = x[:, first:], query[:, :, first:]
            else:
                chain.append((key, value))
            x = x + self._attend(query, base, chain, packing)
            x = x + self.block.mlp(self.block.post_attention_layernorm(x))
            previous = self.norm(x)
            outputs.append(F.pad(previous, (0, 0, first, 0)))
        return outputs

    def _project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Expanded MLA queries, keys and values [B, H, T, ·], as in transformers' attention."""
        attention, config = self.block.self_attn, self.config
        batch, length = x_BTD.shape[:2]
        if config.q_lora_rank is None:
            query = attention.q_proj(x_BTD)
        else:
            query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x_BTD)))
        query = query.view(batch, length, config.num_attention_heads, -1).transpose(1, 2)
        unrotated, rotary = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        latent, rotary_key = attention.kv_a_proj_with_mqa(x_BTD).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        latent, rotary_key = attention.kv_a_layernorm(latent)[:, None], rotary_key[:, None]
        apply = apply_rotary_pos_emb_interleave if config.rope_interleave else apply_rotary_pos_emb
        rotary, rotary_key = apply(rotary, rotary_key, cos, sin)
        key, value = attention.expand_kv(latent, rotary_key)
        return torch.cat([unrotated, rotary], dim=-1), key, value

    def _attend(
        self, query_BHQK: Tensor, base: tuple[Tensor, Tensor], chain: list[tuple[Tensor, Tensor]], packing: Packing
    ) -> Tensor:
        """One softmax over the entries at depth 1 and the chain's own: each part is weighed by its denominator."""
        attention = self.block.self_attn
        out, total = packed_attention(query_BHQK, *base, packing, attention.scaling)
        if chain:
            scores = [(query_BHQK * key).sum(-1).float() * attention.scaling for key, _ in chain]
            weights = torch.stack([total, *scores]).softmax(0).to(query_BHQK.dtype).transpose(2, 3)[..., None]
            out = out * weights[0]
            for weight, (_, value) in zip(weights[1:], chain, strict=True):
                out = out + weight * value.transpose(1, 2)
        return attention.o_proj(out.flatten(2))


def cast_in_place(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts a module as transformers casts what it loads: routers and rotary frequencies stay in float32."""

    def tensors() -> list[tuple[str, Tensor]]:
        return [*module.named_parameters(), *module.named_buffers()]

    exact = {name: tensor.data for name, tensor in tensors() if ".gate." in name or "inv_freq" in name}
    module.to(dtype)
    for name, tensor in tensors():
        tensor.data = exact.get(name, tensor.data)


def cast_parameters(trunk: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the parameters of a model, its LM head with them, but those that its type keeps in float32, such as
    routers."""
    exact, head = tuple(trunk._keep_in_fp32_modules_strict or ()), trunk.get_output_embeddings()
    for name, parameter in trunk.named_parameters():
        if parameter is getattr(head, "weight", None) or not any(part in name for part in exact):
            parameter.data = parameter.data.to(dtype)


def draft_loss(
    outputs: Sequence[Tensor],
    teacher_hidden_BTD: Tensor,
    segment_BT: Tensor,
    lm_head: Tensor,
    temperature: float,
    chunk: int = 512,
    *,
    divergence: Divergence = "kl",
    times_BT: Tensor | None = None,
) -> Tensor:
    """Measures how far each depth's drafts are from the trunk at the rollout temperature, weighted 0.6^(d−1).

    `outputs[d-1][n]` drafts token n + d. Its teacher is the trunk's distribution of that token, from the hidden state
    that precedes it, `teacher_hidden_BTD[n + d]`. `segment_BT` numbers the completions of a row from 1, or the turns of
    each, and is below 1 elsewhere, since a chain starts and ends inside one of them. Teacher and LM head are detached
    (contract 7).
    Returns the sum over drafts, to be divided by the step's completion tokens. A draft of token n counts `times_BT[n]`,
    or once.

    `divergence`: `kl`, forward KL(trunk ‖ draft), or `tv`, 1 − Σ min(p, q), the share of drafts that the best coupling
    would reject (Bebop). If the draft head has a trimmed vocabulary, `lm_head` has the rows of its tokens [K] alone,
    and both are renormalised over them: Σ p log(p/q) over K has its minimum at q = p / p(K) too, and nothing is
    computed over all V.

    FLOPs per scored token, V or K columns: 2·D·V for the teacher, which all depths share, and 4·D·V for each depth.
    """
    head = lm_head.detach()
    depths = range(1, len(outputs) + 1)
    alive = [(segment_BT > 0) & (F.pad(segment_BT, (d, 0), value=-1)[:, :-d] == segment_BT) for d in depths]
    targets = alive[0].flatten().nonzero()[:, 0]  # depth 1 drafts every token that a deeper one drafts
    alive_DN = torch.stack([a.flatten()[targets] for a in alive])
    weights = [DEPTH_DECAY ** (d - 1) for d in depths]
    weights = [weight / sum(weights) for weight in weights]
    teacher_ND = teacher_hidden_BTD.detach().flatten(0, 1)
    rows = [output.flatten(0, 1) for output in outputs]
    times_N = torch.ones_like(targets) if times_BT is None else times_BT.flatten()[targets]
    drafts = zip(targets.split(chunk), alive_DN.split(chunk, dim=1), times_N.split(chunk), strict=True)
    measure = _forward_kl if divergence == "kl" else _total_variation
    return _Divergences.apply(teacher_ND, head, list(drafts), weights, temperature, measure, *rows)


class _Divergences(torch.autograd.Function):
    """The sum that `draft_loss` returns. Its gradient is computed with it, so logits are made once and never kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        teacher_ND: Tensor,
        head_VD: Tensor,
        drafts: Sequence[tuple[Tensor, Tensor, Tensor]],
        weights: Sequence[float],
        temperature: float,
        measure: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        *outputs_ND: Tensor,
    ) -> Tensor:
        """Sums over `drafts`: chunks of C targets [C], the depths [D, C] that draft them, how often each counts [C]."""
        total = torch.zeros((), dtype=torch.float32, device=teacher_ND.device)
        gradients = [torch.zeros_like(output) for output in outputs_ND]
        for at, alive_DC, times_C in drafts:
            log_p = F.log_softmax(F.linear(teacher_ND[at], head_VD).float() / temperature, dim=-1)
            p = log_p.exp()
            of_depths = zip(outputs_ND, gradients, weights, alive_DC, strict=True)
            for d, (output, gradient, weight, alive) in enumerate(of_depths, start=1):
                entries = (at - d).clamp(min=0)  # of dead ones any entry will do: they are masked
                log_q = F.log_softmax(F.linear(output[entries], head_VD).float() / temperature, dim=-1)
                values, slopes = measure(p, log_p, log_q)
                total += weight * (values.masked_fill(~alive, 0.0) * times_C).sum()
                slopes.mul_(weight / temperature).masked_fill_(~alive[:, None], 0.0).mul_(times_C[:, None])
                gradient.index_add_(0, entries, slopes.to(head_VD.dtype) @ head_VD)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*[None] * 6, *[gradient * upstream for gradient in ctx.saved_tensors])


def _forward_kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Computes Σ p log(p/q) of each row, and its gradient in q's logits: q − p."""
    values = torch.einsum("nv,nv->n", p, (log_p - log_q).masked_fill_(p == 0, 0.0))  # neither may have a token: -∞ + ∞
    return values, log_q.exp_().sub_(p)


def _total_variation(p: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Computes 1 − Σ min(p, q) of each row, and its gradient in q's logits: q (Q − [q < p]), Q the mass where q < p."""
    q = log_q.exp_()
    below = (q < p).to(q.dtype)
    mass = torch.einsum("nv,nv->n", q, below)
    return 1.0 - torch.minimum(p, q).sum(-1), q * (mass[:, None] - below)
