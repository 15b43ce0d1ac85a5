"""The DeepSeek-V3 checkpoint layout: the name of every tensor, and whether the files of a checkpoint hold them.

config.json                        num_hidden_layers = N, num_nextn_predict_layers = D
model.safetensors                  or model-0000i-of-0000n.safetensors and model.safetensors.index.json
    model.layers.{0 … N-1}.*       the trunk
    model.layers.{N … N+D-1}.*     the MTP layers: enorm, hnorm, eh_proj, a decoder layer, shared_head.norm
    *.mlp.experts.{e}.gate_proj    experts one by one; in memory they are stacked, gate and up fused
draft_vocabulary.json              {"token_ids": [0, 5, ...]}: what the MTP head may draft (ours, often absent)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from policies.mtp import MTPHead

Shape = tuple[int, ...]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DRAFT_VOCABULARY = "draft_vocabulary.json"  # not safetensors: other engines load every such file of a folder
DRAFT_WAY_OUT = "copy it again, or delete it to draft from the whole vocabulary"
WAY_OUT = "the files are incomplete or config.json is of another model: fetch both again"
MANY = 100_000  # tensors; DeepSeek-V3 has 46,000
# Released configurations have these values, and transformers' DeepseekV3 computes them whatever a configuration has.
# Every policy that we save has them too: without topk_method vLLM refuses the router's bias, and without scoring_func
# it silently computes another router.
FIXED_FIELDS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
OPTIONAL: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class PolicyError(ValueError):
    """A checkpoint that cannot be a policy. The message names what is wrong and the way out."""


class WeightFiles:
    """The safetensors of a checkpoint, by folder or hub id (the files of a hub id are fetched into its cache).

    `shapes` is read from the headers of the files. Raises PolicyError if a file that the index names is missing, if a
    file is damaged or cut short, or if it does not hold the tensors that the index places in it.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        index: dict[str, str] = {}
        single = find_file(self.source, SINGLE)
        files = {SINGLE: single} if single else {}
        if not single and (path := find_file(self.source, INDEX)):
            index = read_index(self.source, path)
            files = {name: self._shard(name, index) for name in sorted(set(index.values()))}
        for path in files.values():
            self._read_header(path)
        for name, file in index.items():
            if self.file_of.get(name) != files[file]:
                raise PolicyError(
                    f"model={self.source!r}: {INDEX} places {name} in {file}, which does not hold it; {WAY_OUT}"
                )

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`."""
        found: dict[str, Tensor] = {}
        for path in sorted({path for name, path in self.file_of.items() if name.startswith(prefix)}):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        return found

    def _shard(self, name: str, index: Mapping[str, str]) -> str:
        if path := find_file(self.source, name):
            return path
        lost = sorted(tensor for tensor, file in index.items() if file == name)
        raise PolicyError(
            f"model={self.source!r} lacks the file {name}, in which {INDEX} places {len(lost)} tensors "
            f"({lost[0]}, ...); copy or download it again"
        )

    def _read_header(self, path: str) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    self.file_of[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            with open(path, "rb") as raw:
                pointer = raw.read(40).startswith(b"version https://git-lfs")
            why = "it is a Git LFS pointer; run `git lfs pull`" if pointer else f"{error}; copy or download it again"
            raise PolicyError(
                f"model={self.source!r}: {Path(path).name} ({Path(path).stat().st_size:,} bytes) is damaged: {why}"
            ) from error


def layer_name(layer: int, name: str) -> str:
    """The name of an MTP head's parameter in the checkpoint, where block and norms are side by side.

    >>> layer_name(61, "block.self_attn.o_proj.weight"), layer_name(61, "norm.weight")
    ('model.layers.61.self_attn.o_proj.weight', 'model.layers.61.shared_head.norm.weight')
    """
    name = name.removeprefix("block.")
    return f"model.layers.{layer}.{'shared_head.norm.weight' if name == 'norm.weight' else name}"


def expert_views(name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stacked tensor as the layout names it: experts one by one, gate and up apart. Other tensors stay whole."""
    experts, _, fused = name.rpartition(".")
    if not experts.endswith(".experts"):
        yield name, stacked
        return
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
    for e, expert in enumerate(stacked):
        for part, view in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{experts}.{e}.{part}.weight", view


def head_state(config: DeepseekV3Config, layer: int, state: Mapping[str, Tensor], idle: bool) -> dict[str, Tensor]:
    """A head's `state` under its names in the layout.

    `idle`: the block of a dense head becomes the shared expert of an MoE block whose routed experts write zeros, which
    is the same function. Released MTP layers are MoE, and transformers' own MTP module expects one.
    """
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
    """Whether this is a dense trunk whose head can be stored as MoE with few zeros, as a converted one can."""
    dense = config.first_k_dense_replace >= config.num_hidden_layers
    shared = config.n_shared_experts * config.moe_intermediate_size
    return dense and shared == config.intermediate_size and 2 <= config.n_routed_experts <= 8 and config.n_group == 1


def mtp_layers(config: PretrainedConfig, names: Iterable[str]) -> list[int]:
    """Numbers of the MTP layers among a checkpoint's tensors.

    >>> mtp_layers(DeepseekV3Config(num_hidden_layers=2), ["model.layers.1.mlp.up_proj", "model.layers.2.enorm.weight"])
    [2]
    """
    found = {int(match[1]) for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    return sorted(layer for layer in found if layer >= getattr(config, "num_hidden_layers", 0))


def check_tensors(files: WeightFiles, config: DeepseekV3Config) -> None:
    """Raises PolicyError if tensors of a checkpoint are missing, not explained by its config, or of other shapes."""
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    stored = mtp_layers(config, files.shapes)
    found = {name: shape for name, shape in files.shapes.items() if not _is_copy(config, name)}
    try:
        with torch.device("meta"):
            own = dict(AutoModelForCausalLM.from_config(config).state_dict())
            for layer in range(first, first + depth if stored else first):
                idle = may_idle(config) and _router(layer) in found
                own |= head_state(config, layer, MTPHead(config).state_dict(), idle)
    except Exception as error:  # sizes that make no model fail in many places
        raise PolicyError(f"model={files.source!r}: config.json makes no model: {error!r}; {WAY_OUT}") from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = sum(2 * len(tensor) if name.endswith("gate_up_proj") else 1 for name, tensor in own.items())
    if names > MANY + 10 * len(found):  # their names alone would fill the memory
        what = f"config.json describes about {names:,} tensors, and the files hold {len(found):,}"
        raise PolicyError(f"model={files.source!r}: {what}; {WAY_OUT}")
    expected: dict[str, Shape] = {}
    for name, tensor in own.items():
        if name in tied and name not in found:
            continue
        views = [(name, tensor)] if name in found else expert_views(name, tensor)
        expected |= {view_name: tuple(view.shape) for view_name, view in views}
    try:
        refuse_differences(files.source, expected, found)
    except PolicyError as error:
        if stored and len(stored) != depth:
            raise PolicyError(
                f"{error}. num_nextn_predict_layers={depth} contradicts {len(stored)} stored MTP layers "
                f"(model.layers.{stored[0]} ...): set it to {len(stored)}, or remove their tensors"
            ) from error
        raise


def refuse_differences(source: str | Path, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raises PolicyError, which names tensors that are missing, misshapen or not expected."""
    misshapen = {name for name in expected.keys() & found.keys() if expected[name] != found[name]}
    for kind, names in (
        ("lacks the tensors", expected.keys() - found.keys()),
        ("has tensors of another shape:", misshapen),
        ("has tensors that its config does not explain:", found.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(_described(name, expected.get(name), found.get(name)) for name in sorted(names)[:5])
            raise PolicyError(f"model={str(source)!r} {kind} {shown} ({len(names)} in all); {WAY_OUT}")


def _described(name: str, expected: Shape | None, found: Shape | None) -> str:
    if expected is None or found is None:
        shape = list(expected or found or ())
        return f"{name} {shape}" if shape else name
    return f"{name} (expected {list(expected)}, found {list(found)})"


@torch.no_grad()
def fill_head(head: MTPHead, stored: Mapping[str, Tensor], layer: int) -> None:
    """Copy MTP layer `layer` of a checkpoint into `head`; `check_tensors` has checked that its tensors fit.

    Raises PolicyError if the head is dense and the layer an MoE block whose routed experts compute something.
    """
    if not hasattr(head.block.mlp, "experts") and _router(layer) in stored:
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


def _router(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def _is_copy(config: DeepseekV3Config, name: str) -> bool:
    """Released checkpoints repeat embedding and LM head in their MTP layers, old ones the rotary frequencies."""
    layer = re.match(r"model\.layers\.(\d+)\.(embed_tokens\.|shared_head\.head\.)", name)
    return bool(layer and int(layer[1]) >= config.num_hidden_layers) or name.endswith(".rotary_emb.inv_freq")


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
        ids = [int(token) for token in json.loads(Path(path).read_text())["token_ids"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise PolicyError(f"model={source!r}: {DRAFT_VOCABULARY} is damaged ({error!r}); {DRAFT_WAY_OUT}") from error
    if not ids or ids != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < vocabulary:
        raise PolicyError(
            f"model={source!r}: the token ids in {DRAFT_VOCABULARY} do not ascend inside 0 … {vocabulary - 1}; "
            f"{DRAFT_WAY_OUT}"
        )
    return torch.tensor(ids)


def find_file(source: str, name: str) -> str | None:
    """Where the file `name` of a folder or hub id is, or None. A GGUF file that is named itself is alone."""
    if Path(source).is_file():
        return None
    if not Path(source).is_dir():
        from policies.files import hub

        if hub.is_id(source):
            hub.unreachable()  # it tells the hub's libraries; else each absent file costs a minute of retries
    return cached_file(source, name, **OPTIONAL)


def read_index(source: str, path: str) -> dict[str, str]:
    try:
        index = dict(json.loads(Path(path).read_text())["weight_map"])
        if wrong := [name for name, file in index.items() if not isinstance(file, str) or Path(file).name != file]:
            raise ValueError(f"{wrong[0]} is in {index[wrong[0]]!r:.60}, which is no file's name")
        return index
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PolicyError(f"model={source!r}: {INDEX} is damaged ({error!r}); copy or download it again") from error


def frozen_parameter_names(config: PretrainedConfig) -> list[str]:
    """Names of the parameters that training must not change; empty for a model that was not converted.

    PEFT and other wrappers put a prefix before a name, so compare with `name.endswith(...)`. The last name of each
    layer is that of the bias inside a LoRA adapter.

    >>> frozen_parameter_names(DeepseekV3Config(num_hidden_layers=1, quartet_exact_mla=True))[:2]
    ['model.layers.0.self_attn.kv_a_layernorm.weight', 'model.layers.0.self_attn.kv_a_proj_with_mqa.bias']
    """
    if not getattr(config, "quartet_exact_mla", False):
        return []
    projection = "kv_a_proj_with_mqa"
    return [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in range(config.num_hidden_layers)
        for name in ("kv_a_layernorm.weight", f"{projection}.bias", f"{projection}.base_layer.bias")
    ]
