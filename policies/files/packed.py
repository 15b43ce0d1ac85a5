"""Checkpoints whose weights are packed into few bits, in the format of compressed-tensors: they load as ordinary ones.

`quartet quantize` writes them. transformers multiplies codes and scales out while it reads the files, so that all that
quartet does with a policy works, at the memory and speed of ordinary weights. vLLM computes with the codes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import CompressedTensorsConfig, PretrainedConfig


def is_packed(config: PretrainedConfig) -> bool:
    """Tells whether the checkpoint of this configuration holds codes and scales.

    >>> is_packed(PretrainedConfig(quantization_config={"quant_method": "compressed-tensors"}))
    True
    """
    fields = getattr(config, "quantization_config", None)
    method = fields.get("quant_method") if isinstance(fields, dict) else getattr(fields, "quant_method", None)
    return str(getattr(method, "value", method)) == "compressed-tensors"


def unreadable(config: PretrainedConfig) -> str | None:
    """Says why a packed checkpoint cannot be multiplied out here: what is in its configuration, and the way out.

    Zero points are refused since transformers leaves out those of routed experts, and activations of few bits since the
    policy would be another one here than where they are rounded.
    """
    fields = config.quantization_config
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    groups = fields.get("config_groups") or {}
    if fields.get("format") != "pack-quantized" or not groups:
        what = f"format={fields.get('format')!r}, and pack-quantized alone is read"
    elif fields.get("kv_cache_scheme"):
        what = "kv_cache_scheme is set, and the cache is not rounded here"
    elif any(group.get(name) for group in groups.values() for name in ("input_activations", "output_activations")):
        what = "activations have few bits, and they are not rounded here"
    elif not all((group.get("weights") or {}).get("symmetric", True) for group in groups.values()):
        what = "weights.symmetric is false, and zero points of routed experts would be left out"
    else:
        return None
    return f"quantization_config: {what}; use a dequantised copy, or one that `quartet quantize` writes"


def loading(source: str | Path) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Raises ValueError where the package is missing."""
    if find_spec("compressed_tensors") is None:
        raise ValueError(
            f"model={str(source)!r} holds quantised weights, which need compressed-tensors: "
            "pip install 'quartet-rl[quantize]'"
        )
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def stays_packed(model: str, method: object) -> str:
    """Says why no policy is trained on weights that transformers leaves packed."""
    return (
        f"model={model!r}: its weights stay packed ({getattr(method, 'value', method)}), and such a policy cannot be "
        "saved; use a dequantised copy, or the original with lora.base: nf4"
    )
