"""Dense Llama-family checkpoint -> MLA with a smaller cache: the cache of the exact form, projected to fewer numbers.

The exact form caches a rotary key and a latent of G·d numbers each. Keys and values of one layer are linear functions
of its input x, whose moments `calibration.observe` has measured. Here R numbers are kept for each token: a rotary key,
a latent shared by values and unrotated keys, and the constants that cancel its norm.

**Rotary keys.** Frequency ω turns the keys of all groups by the same angle, so a complex map across groups commutes
with it. At each frequency the G complex keys, weighed by the queries that they are multiplied with, become G
uncorrelated components (a complex unitary PCA). The components that lose most without rotation keep it.

**The others** lose it: for attention head h they are turned by the mean angle over the tokens that it attends to,
E[e^{iω(n−m)}]. With the values they form one vector u. The latent keeps its r principal components under the metric M,
which is the cost of an error,

    E[(u − û)ᵀ M (u − û)],   M = Σ_h  ρ_h E[q_h q_hᵀ] / d   for keys,   Σ_h W_o,hᵀ W_o,h   for values,

in squared units of the attention's output: a logit that is off by ε moves the output of attention head h by ε times the
spread of its values, ρ_h = tr(W_o,h Cov(v) W_o,hᵀ). A constant latent keeps the means of values exactly. The means of
unrotated keys shift all logits of a query alike, which does not change the softmax.

G KV groups, H query heads, J = d/2 frequencies, C rotary and N unrotated components, r latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedConfig, PreTrainedModel

from policies.conversion.calibration import LayerMoments
from policies.conversion.dense import NUM_CONSTANTS, assemble, check_dense, constants, dense_rotary, mla_config
from policies.conversion.supported import dense_shape

SMALLEST_RANK = 2 + 1 + NUM_CONSTANTS
SPLITS = 8  # the number of sizes of the rotary key that are tried
RIDGE = 1e-9


@dataclass(frozen=True)
class Split:
    """How the cached numbers are shared out. `rotary` [C, 2] has (frequency, rank of the component) of each rotary
    pair, `latents` is r, and `error` the predicted error as a share of what attention computes."""

    rotary: Tensor
    latents: int
    error: float


class _Layer:
    """One dense layer's attention in float64, with its keys as uncorrelated components at each frequency."""

    def __init__(self, attention: Any, config: PreTrainedConfig, moments: LayerMoments, rope_scale: float) -> None:
        heads, groups, d = dense_shape(config)
        weights = (getattr(attention, f"{name}_proj").weight.detach().cpu().double() for name in "qkvo")
        q, k, self.values, out = weights
        self.group = torch.arange(heads) // (heads // groups)
        self.queries = _complex(q, heads)  # [H, J, D]
        self.moments, self.scale = moments, rope_scale**4 / d
        out_HDd = out.view(-1, heads, d).transpose(0, 1)
        covariance = moments.keys - torch.outer(moments.mean, moments.mean)
        self.covariance_x = (covariance + covariance.T) / 2
        value = self.values.view(groups, d, -1)
        spread = value @ self.covariance_x @ value.transpose(1, 2)
        self.spread = torch.einsum("hed,hdf,hef->h", out_HDd, spread[self.group], out_HDd)  # rho_h

        met = (self.queries @ moments.queries.to(self.queries.dtype) * self.queries.conj()).sum(-1).real
        met = met * self.spread[:, None] * self.scale / 2  # [H, J], half: a random phase
        weight_GJ = torch.zeros(groups, d // 2, dtype=torch.float64).index_add_(0, self.group, met)
        weight_GJ = weight_GJ.clamp_min(RIDGE * float(weight_GJ.max()) + 1e-30).sqrt()
        keys = _complex(k, groups) * weight_GJ[..., None]
        keys = keys.transpose(0, 1)  # [J, G, D]
        second = keys @ moments.keys.to(keys.dtype) @ keys.mH
        energy, basis = torch.linalg.eigh((second + second.mH) / 2)  # [J, G], [J, G, G]
        share = basis.abs().square()[:, self.group] * (met / weight_GJ[self.group] ** 2).T[..., None]  # [J, H, G]
        lost = share * (1 - moments.turn.abs().square().clamp_max(1)).T[..., None]
        self.loss = energy.clamp_min(0) * lost.sum(1)  # [J, G]: without rotation, else exact
        order = self.loss.argsort(dim=1, descending=True)
        self.loss = self.loss.gather(1, order)
        basis = basis.gather(2, order[:, None].expand_as(basis))
        self.components = basis.mH @ keys  # [J, G, D]
        meet = basis.conj() / weight_GJ.T[..., None]  # [J, G, component]
        self.meet = meet[:, self.group]  # [J, H, component]
        self.total = float(energy.sum() + self.spread.sum())
        self._weigh(out_HDd)

    def _weigh(self, out_HDd: Tensor) -> None:
        """u = all components (real, then imaginary parts) and then the values, as a map of x; Cov(u); the metric M."""
        frequencies = self.queries.shape[1]
        keys = self.components.flatten(0, 1)
        self.u = torch.cat([keys.real, keys.imag, self.values])
        self.covariance = self.u @ self.covariance_x @ self.u.T
        self.turned = self.meet * self.moments.turn.conj().T[..., None]  # [J, H, component]
        self.metric = torch.zeros_like(self.covariance)
        size, d = 2 * len(keys), 2 * frequencies
        for h, group in enumerate(self.group.tolist()):
            query = (self.queries[h, :, None] * self.turned[:, h, :, None]).flatten(0, 1)
            query = torch.cat([query.real, query.imag])
            self.metric[:size, :size] += query @ self.moments.queries @ query.T * (self.spread[h] * self.scale)
            at = slice(size + group * d, size + (group + 1) * d)
            self.metric[at, at] += out_HDd[h].T @ out_HDd[h]

    def joint(self, unrotated: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes what the components `unrotated` [N, 2] need: its map x -> u [2N + G·d, D], a root L of M = L Lᵀ, and
        of Lᵀ Cov(u) L the eigenvalues and eigenvectors, descending."""
        frequencies, groups = self.loss.shape
        flat, pairs = unrotated[:, 0] * groups + unrotated[:, 1], frequencies * groups
        of = torch.cat([flat, pairs + flat, torch.arange(2 * pairs, len(self.u))])
        metric = self.metric[of][:, of]
        diagonal = metric.diagonal()
        diagonal += RIDGE * diagonal.max() + 1e-30
        root = torch.linalg.cholesky(metric)
        within = root.T @ self.covariance[of][:, of] @ root
        values, vectors = torch.linalg.eigh((within + within.T) / 2)
        return self.u[of], root, values.flip(0).clamp_min(0), vectors.flip(1)

    def weights(self, split: Split, rope_scale: float) -> dict[str, Tensor]:
        """The weights of one `DeepseekV3Attention`."""
        heads, frequencies, hidden = self.queries.shape
        groups, d = self.components.shape[1], 2 * frequencies
        rotated, rank = split.rotary.T
        unrotated = unrotated_pairs(split.rotary, frequencies, groups)
        u, root, values, vectors = self.joint(unrotated)
        r, count = split.latents, 2 * len(unrotated)
        size = (values[:r] + RIDGE * values[0] + 1e-30).sqrt()
        encoder = (vectors[:, :r] / size).T @ root.T  # latents of variance 1
        decoder = torch.linalg.solve_triangular(root.T, vectors[:, :r] * size, upper=True)

        nope = sorted(set(unrotated[:, 0].tolist()))
        keep = math.sqrt((2 * len(nope) + 2 * len(rotated)) / d)  # DeepSeek divides by the root of its own width
        factor = self.meet[rotated, :, rank] * keep  # [C, H]
        rotary_queries = _interleaved((self.queries[:, rotated].transpose(0, 1) * factor[..., None]).transpose(0, 1))
        plain = self.queries[:, nope] * (keep * rope_scale**2)  # [H, F, D]
        queries = torch.cat([plain.real, plain.imag, rotary_queries], dim=1)

        # Attention head h multiplies component i, of frequency f(i), by q_f · z_i: its key at f is Σ_i conj(z_i) a_i.
        turned = self.turned[unrotated[:, 0], :, unrotated[:, 1]]  # [N, H]
        at = torch.zeros(len(nope), len(unrotated), dtype=torch.complex128)
        at[[nope.index(f) for f in unrotated[:, 0].tolist()], range(len(unrotated))] = 1
        mix = at * turned.conj().T[:, None]  # [H, F, N]
        real = torch.cat([torch.cat([mix.real, -mix.imag], 2), torch.cat([mix.imag, mix.real], 2)], 1)
        keys = real @ decoder[:count]  # [H, 2F, r]
        value = decoder[count:].view(groups, d, r)[self.group]  # [H, d, r]
        mean = (self.values @ self.moments.mean).view(groups, d)[self.group]
        block, norm = constants(r)
        carried = torch.zeros(heads, 2 * len(nope) + d, NUM_CONSTANTS, dtype=torch.float64)
        carried[:, 2 * len(nope) :, 0] = mean / (block[0] / norm)
        expand = torch.cat([torch.cat([keys, value], 1), carried], 2)
        rotary_keys = self.components[rotated, rank]
        return {
            "q_proj.weight": queries.reshape(-1, hidden),
            "kv_a_proj_with_mqa.weight": torch.cat(
                [encoder @ u, u.new_zeros(NUM_CONSTANTS, hidden), _interleaved(rotary_keys)]
            ),
            "kv_a_proj_with_mqa.bias": torch.cat(
                [-encoder @ u @ self.moments.mean, block, u.new_zeros(2 * len(rotated))]
            ),
            "kv_a_layernorm.weight": torch.cat([u.new_full((r,), norm), u.new_ones(NUM_CONSTANTS)]),
            "kv_b_proj.weight": expand.reshape(-1, r + NUM_CONSTANTS),
            "o_proj.bias": u.new_zeros(hidden),
        }


@torch.no_grad()
def compress(
    model: PreTrainedModel, moments: Sequence[LayerMoments], rank: int, rotary: int | None = None
) -> tuple[DeepseekV3ForCausalLM, Split]:
    """The dense `model` as MLA that caches `rank` numbers for each token and layer; its exact form caches 2·G·d + 4.

    `rotary` is the size of the rotary key, by default that of the least predicted error. Raises ValueError for sizes
    out of range and `UnsupportedCheckpoint` for a model that has no exact form either.
    """
    check_dense(model)
    check_sizes(model.config, rank, rotary)
    frequencies, rope_scale = dense_rotary(model)
    parts = zip(model.model.layers, moments, strict=True)
    layers = [_Layer(layer.self_attn, model.config, of, rope_scale) for layer, of in parts]
    split = choose_split(layers, rank, rotary)
    config = mla_config(
        model,
        frequencies.cpu()[split.rotary[:, 0]],
        split.latents,
        2 * len(set(unrotated_pairs(split.rotary, *layers[0].loss.shape)[:, 0].tolist())),
    )
    return assemble(model, config, (layer.weights(split, rope_scale) for layer in layers)), split


def exact_rank(config: PreTrainedConfig) -> int:
    """The count of numbers that the exact form caches for each token and layer."""
    _, groups, head_dim = dense_shape(config)
    return 2 * groups * head_dim + NUM_CONSTANTS


def check_sizes(config: PreTrainedConfig, rank: int, rotary: int | None = None) -> None:
    """Raises ValueError for a rank or a size of the rotary key that a dense model of this `config` cannot have."""
    _, groups, head_dim = dense_shape(config)
    if not SMALLEST_RANK <= rank <= exact_rank(config):
        raise ValueError(
            f"rank={rank} is out of range: the dense model caches 2 · {groups} KV heads · {head_dim} = "
            f"{2 * groups * head_dim} numbers a token and layer; use {SMALLEST_RANK} to {exact_rank(config)}"
        )
    most = min(groups * head_dim, (rank - NUM_CONSTANTS - 1) // 2 * 2)
    if rotary is not None and (rotary % 2 or not 2 <= rotary <= most):
        raise ValueError(f"rotary={rotary} is out of range: with rank={rank} use an even number from 2 to {most}")


def choose_split(layers: Sequence[_Layer], rank: int, rotary: int | None = None) -> Split:
    """Tells how much of `rank` is for the rotary key: the split with the least error over all layers."""
    loss = torch.stack([layer.loss / layer.total for layer in layers]).mean(0)  # [J, G]
    ranked = loss.flatten().argsort(descending=True)
    budget = rank - NUM_CONSTANTS

    @cache
    def split(pairs: int) -> Split:
        chosen = ranked[:pairs].sort().values
        rotary_pairs = torch.stack([chosen // loss.shape[1], chosen % loss.shape[1]], 1)
        unrotated = unrotated_pairs(rotary_pairs, *loss.shape)
        latents = budget - 2 * pairs
        tails = [float((layer.joint(unrotated)[2][latents:]).sum()) / layer.total for layer in layers]
        return Split(rotary_pairs, latents, float(loss.sum() - loss.flatten()[chosen].sum()) + sum(tails) / len(layers))

    if rotary is not None:
        return split(rotary // 2)
    most = min(len(ranked), (budget - 1) // 2)
    step = max(1, most // SPLITS)
    best = min(map(split, {*range(most, 0, -step), 1}), key=lambda s: s.error)
    while step > 1:
        step = (step + 1) // 2 if step > 2 else 1
        near = (len(best.rotary), len(best.rotary) - step, len(best.rotary) + step)
        best = min((split(pairs) for pairs in near if 1 <= pairs <= most), key=lambda s: s.error)
    return best


def unrotated_pairs(rotary: Tensor, frequencies: int, groups: int) -> Tensor:
    """The components [N, 2] that are not in `rotary`."""
    rotates = torch.zeros(frequencies, groups, dtype=torch.bool)
    rotates[rotary[:, 0], rotary[:, 1]] = True
    return (~rotates).nonzero()


def _complex(weight: Tensor, heads: int) -> Tensor:
    """Joins rows (j, j + d/2) of attention heads, which rotate together: [heads·d, D] -> complex [heads, d/2, D]."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return torch.complex(halves[:, 0].contiguous(), halves[:, 1].contiguous())


def _interleaved(rows: Tensor) -> Tensor:
    """Complex rows [..., C, D] as real ones [..., 2C, D], real and imaginary part side by side."""
    return torch.view_as_real(rows).movedim(-1, -2).flatten(-3, -2)
