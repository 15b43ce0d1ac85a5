"""The files of a checkpoint in the DeepSeek-V3 layout, and which tensors they hold.

config.json                        num_hidden_layers = N, num_nextn_predict_layers = D
model.safetensors                  or model-0000i-of-0000n.safetensors and model.safetensors.index.json
    model.layers.{0 … N-1}.*       the trunk
    model.layers.{N … N+D-1}.*     the MTP layers, see mtp_layers.py
    *.mlp.experts.{e}.gate_proj    experts one by one; in memory they are stacked, gate and up fused
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.hub import cached_file

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

Shape = tuple[int, ...]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of peft: transformers loads an adapter that it finds beside weights
WAY_OUT = "the files are incomplete or config.json is of another model: fetch both again"
# Released configurations have these values, and transformers' DeepseekV3 computes them whatever a configuration has.
# Every policy that we save has them too: without topk_method vLLM refuses the router's bias, and without scoring_func
# it silently computes another router.
FIXED_FIELDS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
OPTIONAL: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def auto_class(config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """The class of transformers that builds a policy. A model that reads pictures too is built whole where its folder
    says so, or where transformers has no class for its language model alone."""
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    named = whole in (config.architectures or ()) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    reads_pictures = bool(whole) and "text_config" in config.sub_configs and not config.is_encoder_decoder
    return AutoModelForImageTextToText if named and reads_pictures else AutoModelForCausalLM


def is_language_model(config: PretrainedConfig) -> bool:
    return auto_class(config) is AutoModelForImageTextToText or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def rotations(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters of a text configuration: of all layers, or of each kind of layer.

    >>> rotations(Gemma3TextConfig())[0]["rope_theta"]                    # of its sliding layers
    10000.0
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    of_kinds = [one for one in parameters.values() if isinstance(one, dict)]
    return of_kinds or [parameters]


class PolicyError(ValueError):
    """A checkpoint that cannot be a policy. The message names what is wrong and the way out."""


class WeightFiles:
    """The safetensors of a checkpoint, by folder or hub id (the files of a hub id are fetched into its cache).

    `shapes` is read from the headers of the files. Raises PolicyError if a file that the index names is missing, if a
    file is damaged or cut short, or if it does not hold the tensors that the index places in it. So it does for weights
    with an adapter of peft beside them.
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
        if files and find_file(self.source, ADAPTER):
            raise PolicyError(
                f"model={self.source!r} holds an adapter of peft ({ADAPTER}) beside its weights, and transformers "
                "would load both as one: merge it (merge_and_unload of peft) into a folder of its own, or move the two "
                "files of the adapter away"
            )
        for path in files.values():
            self._read_header(path)
        for name, file in index.items():
            if self.file_of.get(name) != files[file]:
                raise PolicyError(
                    f"model={self.source!r}: {INDEX} places {name} in {file}, which does not hold it; {WAY_OUT}"
                )

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`."""
        tensors: dict[str, Tensor] = {}
        for path in sorted({path for name, path in self.file_of.items() if name.startswith(prefix)}):
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        return tensors

    def read_row(self, name: str, row: int) -> Tensor:
        """One row of a matrix."""
        with safe_open(self.file_of[name], framework="pt") as file:
            return cast(Tensor, file.get_slice(name)[row : row + 1][0])

    def _shard(self, name: str, index: Mapping[str, str]) -> str:
        path = find_file(self.source, name)
        if path is None:
            lost = sorted(tensor for tensor, file in index.items() if file == name)
            raise PolicyError(
                f"model={self.source!r} lacks the file {name}, in which {INDEX} places {len(lost)} tensors "
                f"({lost[0]}, ...); copy or download it again"
            )
        return path

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


def expert_views(name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields a stacked tensor as the layout names it: experts one by one, gate and up apart. Others stay whole."""
    experts, _, fused = name.rpartition(".")
    if not experts.endswith(".experts"):
        yield name, stacked
        return
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
    for e, expert in enumerate(stacked):
        for part, view in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{experts}.{e}.{part}.weight", view


def find_file(source: str, name: str) -> str | None:
    """Finds the file `name` of a folder or hub id, or None. A GGUF file that is named itself is alone."""
    if Path(source).is_file():
        return None
    from policies.files import hub

    if not Path(source).is_dir() and hub.is_id(source):
        hub.unreachable()  # it tells the hub's libraries; else each absent file costs a minute of retries
    repository, revision = hub.split(source)
    return cached_file(repository, name, revision=revision, **OPTIONAL)


def read_index(source: str, path: str) -> dict[str, str]:
    """The file of each tensor, by the index at `path`. Raises PolicyError if it is damaged."""
    try:
        index = dict(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"])
        if wrong := [name for name, file in index.items() if not isinstance(file, str) or Path(file).name != file]:
            raise ValueError(f"{wrong[0]} is in {index[wrong[0]]!r:.60}, which is no file's name")
        return index
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PolicyError(f"model={source!r}: {INDEX} is damaged ({error!r}); copy or download it again") from error


def frozen_parameter_names(config: PretrainedConfig) -> list[str]:
    """Names of the parameters that training must not change; empty for a model that was not converted.

    Wrappers put a prefix before a name, so compare with `name.endswith(...)`. The last name of each layer is that of
    the bias inside a LoRA adapter.

    >>> frozen_parameter_names(DeepseekV3Config(num_hidden_layers=1, quartet_exact_mla=True))[:2]
    ['model.layers.0.self_attn.kv_a_layernorm.weight', 'model.layers.0.self_attn.kv_a_proj_with_mqa.bias']
    """
    if not getattr(config, "quartet_exact_mla", False):
        return []
    projection, names = "kv_a_proj_with_mqa", []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn"
        names.append(f"{prefix}.kv_a_layernorm.weight")
        names.append(f"{prefix}.{projection}.bias")
        names.append(f"{prefix}.{projection}.base_layer.bias")
    return names
