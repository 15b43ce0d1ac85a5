"""llm-compressor on a policy: which matrices, by which method, and the files that it writes.

transformers keeps the routed experts of a layer in two 3-D parameters, which no method takes for matrices.
llm-compressor makes linear modules of them, in place, and every expert sees every token of the calibration. In the
files the experts are then one by one, as in any DeepSeek-V3 checkpoint, and transformers and vLLM stack them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from policies import layout, lora, mtp_layers
from policies.policy import Policy

PACKAGES = ("llmcompressor", "compressed_tensors")
MISSING = (
    "quartet quantize needs llm-compressor, which asks for an older transformers than it works with: make quantize, or "
    "pip install 'quartet-rl[quantize]' and then pip install --no-deps llmcompressor==0.14.0.1"
)


def require_packages() -> None:
    """Raises ValueError where something is missing that quantising needs."""
    if any(find_spec(package) is None for package in PACKAGES):
        raise ValueError(MISSING)


def quantize(
    policy: Policy, windows: Sequence[Tensor], method: str, *, bits: int, group_size: int, seed: int
) -> list[str]:
    """Quantises the matrices of the trunk in place. Returns the names of those that keep their precision, since
    `group_size` does not divide their rows. `windows`: token ids [T] that the method measures on. Raises ValueError for
    routed experts that transformers would not read: it stacks them while it reads codes, with no plain matrices among
    them."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from loguru import logger

    logger.disable("llmcompressor")
    trunk = policy.trunk
    linearize_moe(trunk)
    linear = {name: module for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    odd = {name: m.in_features for name, m in linear.items() if m.in_features % group_size and name != "lm_head"}
    if rows_of_experts := [size for name, size in odd.items() if ".experts." in name]:
        raise ValueError(
            f"group_size={group_size} does not divide the rows of the routed experts, {min(rows_of_experts)} numbers, "
            "and transformers cannot read experts in two precisions; use a smaller one that does"
        )
    # Without zero points: transformers leaves out those of routed experts, and refuses those of other matrices.
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head", *odd]}
    measured: dict[str, Any] = {}
    if method != "rtn":
        rows = [window.tolist() for window in windows]
        texts = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        measured = {
            **{"dataset": texts, "processor": policy.tokenizer, "shuffle_calibration_samples": False},
            **{"num_calibration_samples": len(rows), "max_seq_length": len(rows[0]), "pipeline": "sequential"},
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _pinning_where_possible(), _steady_rotary(trunk, len(windows[0]) if measured else 0):
            oneshot(model=trunk, recipe=_recipe(method, scheme, trunk), **measured)
    return list(odd)


@contextmanager
def _pinning_where_possible() -> Iterator[None]:
    """llm-compressor's AWQ pins memory for a GPU even where there is none, and torch refuses that."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = IntermediatesCache.pin_memory
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, *_: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


@contextmanager
def _steady_rotary(trunk: nn.Module, length: int) -> Iterator[None]:
    """llm-compressor first traces a model without storage, and transformers' longrope would keep what it computed then.
    Up to the length of its first training it computes the same again and again."""
    rotary = getattr(trunk.get_decoder(), "rotary_emb", None)
    turns = getattr(rotary, "rope_type", None) == "longrope"
    if rotary is None or not turns or length > trunk.config.rope_parameters["original_max_position_embeddings"]:
        yield
        return
    rotary.rope_type = "default"
    try:
        yield
    finally:
        rotary.rope_type = "longrope"


def _recipe(method: str, scheme: dict[str, Any], trunk: PreTrainedModel) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model

    if method == "gptq":
        return [GPTQModifier(**scheme)]
    if method == "rtn":
        return [QuantizationModifier(**scheme)]
    native = isinstance(trunk, DeepseekV3ForCausalLM)
    mappings = _mappings(trunk.config) if native else get_layer_mappings_from_model(trunk)
    # It divides by the number of rows that are quantised, which must not be zero.
    mappings = [each for each in mappings if not _match(each.balance_layers, scheme["ignore"])]
    return [AWQModifier(mappings=mappings, offload_device=None), QuantizationModifier(**scheme)]


def _match(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns for name in names)


def _mappings(shape: DeepseekV3Config) -> list[Any]:
    """Returns which matrices read what a norm or a matrix gives, so that a scale can move between them.
    llm-compressor's own list for DeepSeek-V3 looks for a router in every layer, and fails where the first are dense."""
    from llmcompressor.modifiers.transform.awq import AWQMapping

    def layers(numbers: range) -> str:
        return rf"re:model\.layers\.({'|'.join(map(str, numbers))})\."

    first, every = shape.first_k_dense_replace, range(shape.num_hidden_layers)
    dense, moe = layers(every[:first]), layers(every[first:])
    norm, matrices = r"post_attention_layernorm$", (r"mlp.*\.gate_proj$", r"mlp.*\.up_proj$")
    readers = {
        r"re:.*\.input_layernorm$": [r"re:.*\.(q|q_a)_proj$", r"re:.*\.kv_a_proj_with_mqa$"],
        **({r"re:.*\.q_a_layernorm$": [r"re:.*\.q_b_proj$"]} if shape.q_lora_rank else {}),
        r"re:.*\.kv_a_layernorm$": [r"re:.*\.kv_b_proj$"],
        **({dense + norm: [dense + name for name in matrices]} if every[:first] else {}),
        **({moe + norm: [moe + name for name in (r"mlp\.gate$", *matrices)]} if every[first:] else {}),
        r"re:.*\.up_proj$": [r"re:.*\.down_proj$"],
    }
    return [AWQMapping(smooth, balanced) for smooth, balanced in readers.items()]


def save(policy: Policy, folder: Path) -> None:
    """Writes the quantised policy: packed weights in the layout of the checkpoint, MTP layers in their precision."""
    policy.trunk.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    for name, content in policy.processor.items():
        (folder / name).write_bytes(content)
    if policy.mtp is None:
        return
    shape = policy.config
    state = mtp_layers.head_state(shape, lora.merged_state(policy.mtp))
    views = (
        view for name, tensor in (state | policy.further_mtp).items() for view in layout.expert_views(name, tensor)
    )
    tensors = {name: view.contiguous() for name, view in views}
    _add_tensors(folder, tensors)
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    mtp = mtp_layers.mtp_layers(shape, tensors)
    fields["num_nextn_predict_layers"] = len(mtp)
    fields["quantization_config"]["ignore"] += [rf"re:model\.layers\.({'|'.join(map(str, mtp))})\..*"]
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if policy.draft_ids is not None:
        mtp_layers.write_draft_vocabulary(folder, policy.draft_ids)


def _add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one more file of weights, and an index of all."""
    files = sorted(folder.glob("*.safetensors"))
    names: dict[str, str] = {}
    for i, path in enumerate(files):
        moved = path.rename(folder / SAFE_WEIGHTS_NAME.replace(".", f"-{i + 1:05d}-of-{len(files) + 1:05d}.", 1))
        with safe_open(moved, "pt") as stored:
            names |= dict.fromkeys(stored.keys(), moved.name)
    last = SAFE_WEIGHTS_NAME.replace(".", f"-{len(files) + 1:05d}-of-{len(files) + 1:05d}.", 1)
    save_file(tensors, folder / last, metadata={"format": "pt"})
    names |= dict.fromkeys(tensors, last)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
