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
    """Whether the checkpoint of this configuration holds codes and scales.

    >>> is_packed(PretrainedConfig(quantization_config={"quant_method": "compressed-tensors"}))
    True
    """
    given = getattr(config, "quantization_config", None)
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return str(getattr(method, "value", method)) == "compressed-tensors"


def loading(source: str | Path) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Raises ValueError where the package is missing."""
    if find_spec("compressed_tensors") is None:
        raise ValueError(
            f"model={str(source)!r} holds quantised weights, which need compressed-tensors: "
            "pip install 'quartet-rl[quantize]'"
        )
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
