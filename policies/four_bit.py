"""Weights in 4 bits: the frozen base of a LoRA run in NF4, by transformers and bitsandbytes.

A block of 64 numbers of a matrix becomes 64 codes of 4 bits and an fp32 scale, .5625 bytes a number. transformers does
so with the linear modules of a model, but for the LM head. Embedding, norms, routers and the routed experts, which are
3-D parameters and no modules, stay in the precision of the run.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

BLOCK = 64
CODE_BYTES = 4 * 16  # the values of the codes, which each matrix has of its own
# On some processors it says at every import that a kernel is missing, which we do not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def loading(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`. The codes are chosen on the CPU, so that they are the same for every device."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def as_ordinary_model(trunk: PreTrainedModel) -> None:
    """Make a model that was just loaded from few bits one of ours: its configuration does not say so, and is saved as
    that of an ordinary model; and no forward writes to its weights."""
    for part in trunk.modules():
        if isinstance(part, PreTrainedModel):
            vars(part.config).pop("quantization_config", None)
            vars(part.config).pop("_is_quantized", None)
        # On a processor with AVX512-BF16 the first forward without gradient would round the scales to bfloat16.
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "hf_device_map"):
        vars(trunk).pop(name, None)


def chosen(trunk: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of a model without adapters that `loading` would put into 4 bits; it may be without storage."""
    ignored = get_keys_to_not_convert(trunk)
    return {
        f"{name}.weight": module.weight
        for name, module in trunk.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, ignored)
    }


def bytes_of(weight: Tensor) -> int:
    """Counts what an ordinary weight [out, in] takes in 4 bits.

    >>> bytes_of(torch.empty(576, 576)) / 576**2
    0.5626929012345679
    """
    return -(-weight.numel() // 2) + 4 * -(-weight.numel() // BLOCK) + CODE_BYTES


def is_held(parameter: Tensor) -> bool:
    """Tells whether this parameter is in 4 bits."""
    return getattr(parameter, "quant_state", None) is not None


def plain_weight(parameter: Tensor) -> Tensor:
    """The numbers that a module computes with: the parameter itself, or those that its codes mean, [out, in] in the
    precision of the run."""
    if not is_held(parameter):
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def parts(parameter: Tensor) -> dict[str, Tensor]:
    """All tensors of a parameter, by the ends of their names: itself, or codes and scales."""
    return {"": parameter, ".scales": parameter.quant_state.absmax} if is_held(parameter) else {"": parameter}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` without scales. What is in 4 bits is there as the parameter, for `plain_weight`."""
    held = {name: parameter for name, parameter in model.named_parameters() if is_held(parameter)}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    plain = {name: tensor for name, tensor in state.items() if f"{name.rpartition('.weight.')[0]}.weight" not in held}
    return plain | held


def counts(trunk: nn.Module) -> dict[str, Any]:
    """Counts the weights of a loaded base in 4 bits, those that are not, and the routed experts' among these."""
    base = [(name, weight) for name, weight in trunk.named_parameters() if ".lora_" not in name]
    held = sum(weight.quant_state.shape.numel() for _, weight in base if is_held(weight))
    others = [(name, weight.numel()) for name, weight in base if not is_held(weight)]
    experts = sum(number for name, number in others if ".experts." in name)
    return {"in_4_bits": held, "not_in_4_bits": sum(number for _, number in others), "routed_experts": experts}


def try_out(device: torch.device) -> None:
    """Raises ValueError where bitsandbytes cannot compute on this device."""
    ones = torch.ones(BLOCK, 2)
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(ones.to(device), quant_type="nf4")
        faithful = torch.equal(dequantize_4bit(codes, state), ones.to(device))
        words = "ones do not come back as ones"
    except Exception as error:  # whatever bitsandbytes and its libraries raise
        faithful, words = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not faithful:
        raise ValueError(
            f"lora.base=nf4: bitsandbytes cannot compute on device={device} here ({words}); use another device, or set "
            "lora.base to null"
        )
