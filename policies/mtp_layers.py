"""The MTP layers of a checkpoint, the first of which is a policy's draft head: their names, and how they are read.

model.layers.{N … N+D-1}.*    enorm, hnorm, eh_proj, a decoder layer, shared_head.norm; the trunk has N layers
draft_vocabulary.json         {"token_ids": [0, 5, ...]}: what the draft head may draft (ours, often absent)
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3Config, PretrainedConfig, PreTrainedModel

from policies.layout import PolicyError, WeightFiles, expert_views, find_file
from policies.mtp import MTPHead

LOGGER = logging.getLogger(__name__)
DRAFT_VOCABULARY = "draft_vocabulary.json"  # not safetensors: other engines load every such file of a folder
DRAFT_WAY_OUT = "copy it again, or delete it to draft from the whole vocabulary"
NO_HEAD = (
    "model=%r: config.json promises num_nextn_predict_layers=%d, but no MTP layer is stored (transformers drops them "
    "when it saves): no draft head; quartet mtp gives a fresh one"
)
OWN_COPIES = (
    "model=%r: %s differ from the trunk's. The draft head uses the trunk's in their place, so it may draft worse than "
    "before (no token changes), and a policy that is saved does not hold them"
)
FURTHER_LAYERS = (
    "model=%r has %d MTP layers: the first is trained and drafts at every depth, the others are kept and saved "
    "as they are"
)


def layer_name(layer: int, name: str) -> str:
    """The name of an MTP head's parameter in the checkpoint, where block and norms are side by side.

    >>> layer_name(61, "block.self_attn.o_proj.weight"), layer_name(61, "norm.weight")
    ('model.layers.61.self_attn.o_proj.weight', 'model.layers.61.shared_head.norm.weight')
    """
    name = name.removeprefix("block.")
    return f"model.layers.{layer}.{'shared_head.norm.weight' if name == 'norm.weight' else name}"


def head_state(
    config: DeepseekV3Config, state: Mapping[str, Tensor], layer: int | None = None, idle: bool | None = None
) -> dict[str, Tensor]:
    """A draft head's `state` under its names in the layout, by default as the first MTP layer.

    `idle`: the block of a dense head becomes the shared expert of an MoE block whose routed experts write zeros, which
    is the same function. Released MTP layers are MoE, and transformers' own MTP module expects one. None: `may_idle`.
    """
    layer = config.num_hidden_layers if layer is None else layer
    idle = may_idle(config) if idle is None else idle
    named = {layer_name(layer, name): tensor for name, tensor in state.items()}
    if not idle:
        return named
    mlp = f"model.layers.{layer}.mlp."
    moved = {name.replace(mlp, f"{mlp}shared_experts."): tensor for name, tensor in named.items()}
    like = named[f"{mlp}up_proj.weight"]
    experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    return moved | {
        f"{mlp}gate.weight": like.new_zeros(experts, hidden),
        f"{mlp}gate.e_score_correction_bias": like.new_zeros(experts),
        f"{mlp}experts.gate_up_proj": like.new_zeros(experts, 2 * width, hidden),
        f"{mlp}experts.down_proj": like.new_zeros(experts, hidden, width),
    }


def may_idle(config: DeepseekV3Config) -> bool:
    """Tells whether this dense trunk's draft head can be stored as MoE with few zeros, as a converted one can."""
    dense = config.first_k_dense_replace >= config.num_hidden_layers
    shared = config.n_shared_experts * config.moe_intermediate_size
    return dense and shared == config.intermediate_size and 2 <= config.n_routed_experts <= 8 and config.n_group == 1


def mtp_layers(config: PretrainedConfig, names: Iterable[str]) -> list[int]:
    """Numbers of the MTP layers among a checkpoint's tensors.

    >>> mtp_layers(DeepseekV3Config(num_hidden_layers=2), ["model.layers.1.mlp.up_proj", "model.layers.2.enorm.weight"])
    [2]
    """
    numbers = {int(match[1]) for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    return sorted(layer for layer in numbers if layer >= getattr(config, "num_hidden_layers", 0))


def stored_head(
    files: WeightFiles, trunk: PreTrainedModel, dtype: torch.dtype, *, fresh: bool, seed: int
) -> tuple[MTPHead | None, dict[str, Tensor]]:
    """The draft head of a checkpoint whose `trunk` is loaded, and the tensors of its further MTP layers by name.

    Where no MTP layer is stored the draft head is None, or with `fresh` one that is drawn from `seed`.
    """
    config, layers = trunk.config, mtp_layers(trunk.config, files.shapes)
    if not layers and not fresh:
        if config.num_nextn_predict_layers:
            LOGGER.warning(NO_HEAD, files.source, config.num_nextn_predict_layers)
        return None, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MTPHead(config).cast(dtype)
    if layers:
        fill_head(head, files.read(f"model.layers.{layers[0]}."), layers[0])
        if copies := own_copies(files, layers[0], trunk):
            LOGGER.warning(OWN_COPIES, files.source, ", ".join(copies))
    if len(layers) > 1:
        LOGGER.warning(FURTHER_LAYERS, files.source, len(layers))
    tensors = [files.read(f"model.layers.{layer}.") for layer in layers[1:]]
    return head, dict(item for part in tensors for item in part.items())


@torch.no_grad()
def fill_head(head: MTPHead, stored: Mapping[str, Tensor], layer: int) -> None:
    """Copy MTP layer `layer` of a checkpoint into `head`; `check_tensors` has checked that its tensors fit.

    Raises PolicyError if the draft head is dense and the layer an MoE block whose routed experts compute something.
    """
    if not hasattr(head.block.mlp, "experts") and router_name(layer) in stored:
        routed = f"model.layers.{layer}.mlp.experts."
        busy = [n for n, t in stored.items() if n.startswith(routed) and "down_proj" in n and bool(t.any())]
        if busy:
            raise PolicyError(f"{busy[0]} is not zero, and a dense policy has a dense draft head; drop the MTP layers")
        stored = {name.replace(".mlp.shared_experts.", ".mlp."): tensor for name, tensor in stored.items()}
    for name, tensor in head.state_dict().items():
        name = layer_name(layer, name)
        views = [(name, tensor)] if name in stored else expert_views(name, tensor)
        for view_name, view in views:
            view.copy_(stored[view_name])


def router_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def own_copies(files: WeightFiles, layer: int, trunk: PreTrainedModel) -> list[str]:
    """Names of the embedding and LM head of MTP layer `layer`, if it has them and they differ from the trunk's."""
    shared = {
        f"model.layers.{layer}.embed_tokens.weight": trunk.get_input_embeddings().weight,
        f"model.layers.{layer}.shared_head.head.weight": trunk.get_output_embeddings().weight,
    }
    there = [name for name in shared if name in files.shapes]
    return [name for name in there if not torch.equal(files.read(name)[name].to(shared[name]), shared[name])]


def write_draft_vocabulary(folder: Path, ids_K: Tensor) -> None:
    (folder / DRAFT_VOCABULARY).write_text(json.dumps({"token_ids": ids_K.tolist()}) + "\n")


def read_draft_vocabulary(source: str, vocabulary: int) -> Tensor | None:
    """The token ids that may be drafted [K], or None without such a file. Raises PolicyError if it is damaged."""
    path = find_file(source, DRAFT_VOCABULARY)
    if path is None:
        return None
    try:
        ids = [int(token) for token in json.loads(Path(path).read_text(encoding="utf-8"))["token_ids"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise PolicyError(f"model={source!r}: {DRAFT_VOCABULARY} is damaged ({error!r}); {DRAFT_WAY_OUT}") from error
    if not ids or ids != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < vocabulary:
        raise PolicyError(
            f"model={source!r}: the token ids in {DRAFT_VOCABULARY} do not ascend inside 0 … {vocabulary - 1}; "
            f"{DRAFT_WAY_OUT}"
        )
    return torch.tensor(ids)
