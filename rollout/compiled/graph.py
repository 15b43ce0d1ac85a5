"""One round of decoding as a function of tensors alone: drafts, the trunk's step, the choice and the verification.

Eager code decides by numbers, such as how long the longest row is. Here what differs from call to call is a tensor:
lengths, temperatures, limits. So one graph serves all rounds of a bucket (see `Bucket`).

Axes: B places for rows, k drafts, S = k + 1 tokens of a place, C entries of a cache, of which the first T are read, D
hidden, E width of an entry.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.decoding.absorbed import AbsorbedBlock
from policies.decoding.kernels import attention, plain_attention
from policies.decoding.linear import FixedLinear
from rollout.backends import Decoder
from rollout.cost_table import FEW_ROWS, MOST_ROWS
from rollout.drafts.speculative import until_end, verify_draft
from rollout.sampling import DraftVocabulary, Noise, choose

Copied = TypeVar("Copied")


@dataclass(frozen=True)
class Bucket:
    """What a graph is made for: `rows` places, `drafts` for each, and caches of `entries`; 0 where it takes any."""

    rows: int
    drafts: int
    entries: int


@dataclass
class Inputs:
    """What a round reads, [B] first nearly everywhere. The last five are there with drafts alone: see Rows and
    Drafter."""

    last: Tensor
    count: Tensor
    prompt_length: Tensor
    lengths: Tensor  # of the trunk's cache
    alive: Tensor
    limit: Tensor
    keys_B2: Tensor
    temperature: Tensor  # float32; 0 is greedy
    start: Tensor  # see SamplingParams
    stops: Tensor  # any number of token ids
    columns: Tensor  # [T], the numbers from 0: attention reads so many entries of each row
    layers: list[Tensor]  # the trunk's cache, changed in place
    unread: Tensor | None = None
    unread_tokens_BS: Tensor | None = None
    unread_hidden_BSD: Tensor | None = None
    head_lengths: Tensor | None = None
    head_layer: Tensor | None = None

    @property
    def caches(self) -> list[Tensor]:
        """Gives what a round changes in place."""
        return [*([] if self.head_layer is None else [self.head_layer]), *self.layers]

    @property
    def others(self) -> dict[str, Tensor]:
        named = vars(self).items()
        return {name: value for name, value in named if name not in ("layers", "head_layer") and value is not None}

    def flat(self) -> list[Tensor]:
        return [*self.others.values(), *self.caches]

    @classmethod
    def of(cls, flat: Sequence[Tensor], layers: int) -> Inputs:
        """The inverse of `flat`."""
        names = [name for name in cls.__dataclass_fields__ if name != "layers"]
        named = dict(zip(names, flat[: len(flat) - layers], strict=False))
        return cls(**named, layers=list(flat[len(flat) - layers :]))


class GraphCache:
    """A `LatentCache` for rows without a shared prompt, as a graph computes it: the entries of all `columns` are read,
    and masked."""

    def __init__(
        self, layers: Sequence[Tensor], lengths_B: Tensor, columns_T: Tensor, value_width: int, first: int = 0
    ) -> None:
        self.layers, self.lengths, self.columns = layers, lengths_B, columns_T
        self.value_width, self.first = value_width, first

    def plan(self, new: int) -> None:
        (rows, entries), columns = self.layers[0].shape[:2], self.columns
        at = (self.lengths[:, None] + torch.arange(new)).clamp(max=columns.shape[0] - 1)
        self.at = (torch.arange(rows)[:, None] * entries + at).flatten()
        visible = columns <= at[..., None]
        if self.first:
            visible = visible & ((columns >= self.first) | (columns == at[..., None]))
        self.mask_BST = torch.where(visible, 0.0, -torch.inf)

    def attend(self, layer: int, query_BSHK: Tensor, new_BSE: Tensor) -> Tensor:
        rows, new, heads = query_BSHK.shape[:3]
        cached = self.layers[layer]
        cached.view(-1, cached.shape[-1]).index_copy_(0, self.at, new_BSE.flatten(0, 1))
        mask = self.mask_BST[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)
        fuses = cached.device.type == "cpu" and cached.dtype == torch.float32  # products, by the compiler
        attend = plain_attention if fuses else attention
        out, _ = attend(query_BSHK.flatten(1, 2), cached.narrow(1, 0, self.columns.shape[0]), self.value_width, mask)
        return out.view(rows, new, heads, self.value_width)

    def advance(self, kept_B: Tensor | int) -> None:
        self.lengths = self.lengths + kept_B


class Round(nn.Module):
    """The round of one bucket. Its buffers are the weights of a decoder, under names that stay the same."""

    def __init__(self, decoder: Decoder, bucket: Bucket) -> None:
        super().__init__()
        self.bucket, self.decoder = bucket, decoder
        for name, tensor in weights(decoder, bucket).items():
            self.register_buffer(name, tensor)

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Targets [B, S], their log-probabilities, the hidden states before them [B, S, D], how many are kept [B], and
        which rows stop [B]. With drafts also those [B, k] and how many are accepted [B]."""
        decoder, depth = _with(self.decoder, dict(self.named_buffers(remove_duplicate=False))), self.bucket.drafts
        trunk = decoder.trunk
        inputs = Inputs.of(flat, len(trunk.blocks))
        steps = torch.arange(depth + 1)
        noise = Noise(inputs.keys_B2[:, None], (inputs.start + inputs.count)[:, None] + steps, len(trunk.embedding))
        ids, drafts = inputs.last[:, None], None
        if depth:
            drafts = _chain(decoder, inputs, noise, depth)
            ids = torch.cat([ids, drafts], dim=1)
        positions = (inputs.prompt_length + inputs.count - 1)[:, None] + steps
        cache: Any = GraphCache(inputs.layers, inputs.lengths, inputs.columns, trunk.config.kv_lora_rank)
        hidden = trunk(ids, positions.clamp(max=decoder.context - 1), cache)
        flat_logits = trunk.logits(hidden).flatten(0, 1)
        by_token = inputs.temperature.repeat_interleave(depth + 1)
        targets, logprobs = (x.view(-1, depth + 1) for x in choose_by_row(flat_logits, by_token, noise.flatten()))
        accepted = None if drafts is None else verify_draft(targets, drafts)
        kept, stopped = until_end(targets, accepted, inputs.alive, inputs.limit - inputs.count, inputs.stops)
        results = targets, logprobs, hidden, kept, stopped
        return results if drafts is None or accepted is None else (*results, drafts, accepted)


def choose_by_row(
    logits_NV: Tensor, temperature_N: Tensor, noise: Noise, vocabulary: DraftVocabulary | None = None
) -> tuple[Tensor, Tensor]:
    """Chooses as `choose` with a temperature for every row, by the same operators for all rows."""
    greedy = temperature_N == 0
    scaled = logits_NV.float() / torch.where(greedy, 1.0, temperature_N)[:, None]
    best = scaled.argmax(-1)
    best = best if vocabulary is None else vocabulary.ids[best]
    drawn, logprobs = choose(scaled, 1.0, noise, vocabulary)
    of_best = logprobs
    if vocabulary is None:  # drafts are not scored
        of_best = scaled.gather(1, best[:, None])[:, 0] - scaled.logsumexp(-1)
    return torch.where(greedy, best, drawn), torch.where(greedy, of_best, logprobs)


def _chain(decoder: Decoder, inputs: Inputs, noise: Noise, depth: int) -> Tensor:
    """Drafts as `Drafter.draft` does, for a draft head that has at most so many tokens of each row to read as there is
    place for."""
    head = decoder.head
    assert head is not None
    assert inputs.unread is not None
    assert inputs.unread_tokens_BS is not None
    assert inputs.head_layer is not None
    assert inputs.head_lengths is not None
    rank = head.trunk.config.kv_lora_rank
    cache: Any = GraphCache([inputs.head_layer], inputs.head_lengths, inputs.columns, rank, first=1)
    ends = inputs.prompt_length + inputs.count
    positions = (ends - inputs.unread)[:, None] + torch.arange(inputs.unread_tokens_BS.shape[1])
    most = decoder.context - 1
    out = head(inputs.unread_tokens_BS, inputs.unread_hidden_BSD, positions.clamp(max=most), cache)
    cache.advance(inputs.unread)
    out = out[torch.arange(ends.shape[0]), (inputs.unread - 1).clamp(min=0)]
    drafts: list[Tensor] = []
    for d in range(depth):
        drafts.append(choose_by_row(head.logits(out), inputs.temperature, noise.at(d), decoder.draft_vocabulary)[0])
        if d + 1 < depth:
            out = head(drafts[-1][:, None], out[:, None], (ends + d)[:, None].clamp(max=most), cache)[:, 0]
            cache.advance(1)
    return torch.stack(drafts, dim=1)


def takes_any_size(device: torch.device) -> bool:
    """Tells whether one graph serves caches of any size there: one that is compiled does, a recorded one does not."""
    return device.type == "cpu"


def takes_any_rows(decoder: Decoder) -> bool:
    """Tells whether it also serves any number of rows. Where experts or heads are chosen it has to know how many."""
    blocks = [*decoder.trunk.blocks, *([] if decoder.head is None else [decoder.head.block])]
    routed = any(block.gate is not None or block.choice is not None for block in blocks)
    return takes_any_size(decoder.trunk.device) and not routed


def most_rows(decoder: Decoder) -> int:
    """Tells how many rows graphs decode."""
    return MOST_ROWS if takes_any_rows(decoder) else FEW_ROWS


def weights(decoder: Decoder, bucket: Bucket) -> dict[str, Tensor]:
    """All tensors of the decoder that a round reads, by name."""
    tensors: dict[str, Tensor] = {}
    for name, part in _parts(decoder, bucket):
        tensors |= {f"{name}_{key}": value for key, value in _tensors(part).items()}
    return tensors


def _parts(decoder: Decoder, bucket: Bucket) -> list[tuple[str, Any]]:
    trunk, head = decoder.trunk, decoder.head
    parts = [("trunk", trunk), ("rope", trunk.rope), *((f"block{i}", block) for i, block in enumerate(trunk.blocks))]
    parts += [(f"heads{i}", block.choice) for i, block in enumerate(trunk.blocks) if block.choice is not None]
    if bucket.drafts and head is not None:
        parts += [("head", head), ("head_block", head.block)]
        if decoder.draft_vocabulary is not None:
            parts.append(("vocabulary", decoder.draft_vocabulary))
    return parts


def _tensors(part: object) -> dict[str, Tensor]:
    tensors = {}
    for name, value in vars(part).items():
        if isinstance(value, Tensor) and name not in ("experts", "chosen"):  # those of the last call
            tensors[name] = value
        elif isinstance(value, FixedLinear):
            tensors |= {f"{name}_weight": value.weight}
            if value.bias is not None:
                tensors[f"{name}_bias"] = value.bias
    return tensors


def _with(decoder: Decoder, tensors: dict[str, Tensor]) -> Any:
    """The decoder with these tensors in place of its own."""
    trunk = _copy(decoder.trunk, "trunk", tensors)
    trunk.rope = _copy(trunk.rope, "rope", tensors)
    trunk.blocks = [_block(block, f"block{i}", tensors) for i, block in enumerate(trunk.blocks)]
    for i, block in enumerate(trunk.blocks):
        if block.choice is not None:
            block.choice = _copy(block.choice, f"heads{i}", tensors)
    head = decoder.head
    if head is not None and "head_norm" in tensors:
        shares = head.logits is decoder.trunk.logits
        head = _copy(head, "head", tensors)
        head.trunk, head.block = trunk, _block(head.block, "head_block", tensors)
        if shares:
            head.logits = trunk.logits
    vocabulary = decoder.draft_vocabulary
    if vocabulary is not None and "vocabulary_ids" in tensors:
        vocabulary = _copy(vocabulary, "vocabulary", tensors)
    copied: Any = copy.copy(decoder)
    for name, value in {"trunk": trunk, "head": head, "draft_vocabulary": vocabulary}.items():
        object.__setattr__(copied, name, value)  # the copy is as frozen as the decoder
    return copied


def _block(block: AbsorbedBlock, name: str, tensors: dict[str, Tensor]) -> AbsorbedBlock:
    copied: AbsorbedBlock = _copy(block, name, tensors)
    copied.run_experts = run_few_experts
    return copied


def run_few_experts(x_ND: Tensor, weights_Nk: Tensor, experts_Nk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Computes as `run_experts`, for few tokens: the chosen experts are gathered, or all are computed. Gathering reads,
    writes and reads again, so it is for half of the experts or fewer. A graph has no grouped product in float32, which
    is a loop over the experts on a CPU."""
    if 2 * experts_Nk.numel() <= len(gate_up):
        gate, up = torch.einsum("nkid,nd->nki", gate_up[experts_Nk], x_ND).chunk(2, dim=-1)
        out = torch.einsum("nkdi,nki->nkd", down[experts_Nk], F.silu(gate) * up)
        return (out * weights_Nk[..., None].to(out.dtype)).sum(1)
    share_NE = x_ND.new_zeros(len(x_ND), len(gate_up)).scatter(1, experts_Nk, weights_Nk.to(x_ND.dtype))
    gate, up = torch.einsum("eid,nd->eni", gate_up, x_ND).chunk(2, dim=-1)
    out = torch.einsum("edi,eni->end", down, F.silu(gate) * up)
    return torch.einsum("end,ne->nd", out, share_NE)


def _copy(part: Copied, name: str, tensors: dict[str, Tensor]) -> Copied:
    copied = copy.copy(part)
    for key, value in vars(part).items():
        if isinstance(value, FixedLinear):
            linear = copy.copy(value)
            linear.weight, linear.bias = tensors[f"{name}_{key}_weight"], tensors.get(f"{name}_{key}_bias")
            vars(copied)[key] = linear
        elif f"{name}_{key}" in tensors:
            vars(copied)[key] = tensors[f"{name}_{key}"]
    return copied
