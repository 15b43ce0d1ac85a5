"""The frozen base of a LoRA run in 4 bits (`lora.base`): which runs can have it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.run.hardware import device_of
from policies import four_bit, presets
from policies.files import gguf
from policies.layout import PolicyError

WAY_OUT = "set lora.base to null"


def in_4_bits(options: object) -> bool:
    """Whether a run keeps the weights under its adapters in 4 bits."""
    return getattr(getattr(options, "lora", None), "base", None) == "nf4"


def check_base(options: Any) -> None:
    """Raises ValueError where a run asks for a base in 4 bits that it cannot have, before a model is looked at."""
    if not in_4_bits(options):
        return
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"lora.base=nf4 needs bitsandbytes: pip install 'quartet-rl[low-memory]', or {WAY_OUT}")
    parallel, workers = options.learner.parallel, options.learner.workers
    ranks = max(workers, int(os.environ.get("WORLD_SIZE", "1")), parallel.replicate * parallel.tensor)
    if max(ranks, parallel.fsdp or 1, parallel.expert) > 1:
        raise ValueError(
            "lora.base=nf4 with several ranks (learner.workers, learner.parallel, accelerate launch or torchrun): "
            f"weights in 4 bits are not sharded here; learn in one process, or {WAY_OUT}"
        )
    if options.warm_start.steps:
        raise ValueError(
            f"lora.base=nf4 with warm_start.steps={options.warm_start.steps}: the warm start trains every weight in "
            f"full precision, so it would need the memory that 4 bits save; run quartet sft before and name its run as "
            f"model, or {WAY_OUT}"
        )
    if options.model in presets.PRESETS:
        raise ValueError(
            f"lora.base=nf4 with model={options.model}: a preset has random weights; train it before (quartet sft) and "
            f"name its run as model, or {WAY_OUT}"
        )
    if gguf.file_of(options.model):
        raise ValueError(
            f"lora.base=nf4 with model={options.model}: the weights of a GGUF file are made dense, and were rounded "
            f"once; name the model that it was made from, or {WAY_OUT}"
        )
    device = device_of(options.device)
    try:
        _try_out(device)
    except Exception as error:  # whatever bitsandbytes and its libraries raise
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"lora.base=nf4: bitsandbytes cannot compute on device={device} here ({words}); "
            f"use another device, or {WAY_OUT}"
        ) from error


def refuse_checkpoint(options: Any, checkpoint: Path | None) -> None:
    """Raises ValueError where `options.model` means a checkpoint: it holds a part of a policy, whose rest is loaded."""
    if checkpoint is not None and in_4_bits(options):
        raise ValueError(
            f"lora.base=nf4 needs a saved policy, and model={options.model!r} means the checkpoint {checkpoint}; "
            f"export it first (quartet export), or {WAY_OUT}"
        )


def refuse_preset(checkpoint: Path | None, base: str) -> None:
    """Raises PolicyError for a checkpoint of a run that began with the preset `base`."""
    if checkpoint is not None and base in presets.PRESETS:
        raise PolicyError(
            f"{checkpoint} continues the preset {base!r}, whose tokenizer is saved at the end of the run only; "
            "let the run end: --resume auto"
        )


def counts(trunk: nn.Module) -> dict[str, Any]:
    """How many weights of a loaded base are in 4 bits, how many are not, and how many of those are routed experts'."""
    base = [(name, weight) for name, weight in trunk.named_parameters() if ".lora_" not in name]
    held = sum(weight.quant_state.shape.numel() for _, weight in base if four_bit.is_held(weight))
    others = [(name, weight.numel()) for name, weight in base if not four_bit.is_held(weight)]
    experts = sum(number for name, number in others if ".experts." in name)
    return {"in_4_bits": held, "not_in_4_bits": sum(number for _, number in others), "routed_experts": experts}


def _try_out(device: torch.device) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(torch.ones(four_bit.BLOCK, 2, device=device), quant_type="nf4")
    if not torch.equal(dequantize_4bit(codes, state), torch.ones(four_bit.BLOCK, 2, device=device)):
        raise RuntimeError("ones do not come back as ones")
