"""`quartet policy inspect`: what a policy is made of, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import DeepseekV3Config

from grpo.config.learner import LoraOptions
from grpo.source.policy_source import find_policy, shape_of
from policies import presets
from policies.anatomy import LORA_AIM, Anatomy, anatomy
from policies.contradictions import check_tensors
from policies.layout import INDEX, WeightFiles, find_file, read_index
from policies.lora import reach_in_words
from policies.mtp_layers import mtp_layers
from policies.policy import read_config

CONTEXT = 4096


def inspect(model: str, context: int | None = None) -> Anatomy:
    """Counts the parts of a preset, a run, a checkpoint folder, a GGUF file or a hub id, without loading or fetching
    weights. `context`: tokens to attend to; 4096 or the longest by default. The files of a folder are checked, too."""
    source = find_policy(model, read=False)
    shape, preset = shape_of(source), source.base in presets.PRESETS
    depth = shape.num_nextn_predict_layers if preset else _mtp_depth(source.base, read_config(source.base))
    longest = max(getattr(shape, "max_position_embeddings", None) or 0, 0) or CONTEXT  # XLNet says -1: there is none
    context, lora = min(CONTEXT, longest) if context is None else context, LoraOptions()
    return anatomy(shape, depth, context=context, lora_rank=lora.rank, lora_alpha=lora.alpha)


def _mtp_depth(model: str, shape: object) -> int:
    """Returns how many MTP layers are stored, as far as that is known without fetching weights."""
    if not isinstance(shape, DeepseekV3Config):
        return 0
    if Path(model).is_dir():
        files = WeightFiles(model)
        if files.shapes:
            check_tensors(files, shape)
            return len(mtp_layers(shape, files.shapes))
    elif index := find_file(model, INDEX):
        return len(mtp_layers(shape, read_index(model, index)))
    return shape.num_nextn_predict_layers


def table(model: str, anatomy: Anatomy) -> Table:
    result = Table(title=model, show_header=False)
    for name, value in _rows(anatomy):
        result.add_row(name, value)
    return result


def as_json(model: str, anatomy: Anatomy) -> dict[str, Any]:
    """Returns {"model": "tiny", "parameters": 2287616, ..., "cache_bytes": {"float32": 1024, "bfloat16": 512}, ...}"""
    numbers = anatomy.cache_numbers
    return asdict(anatomy) | {
        "model": model,
        "cache_bytes": None if numbers is None else {"float32": 4 * numbers, "bfloat16": 2 * numbers},
        "lora_share": anatomy.lora_share,
        "lora_rank_within_aim": anatomy.lora_rank_within_aim,
    }


def _rows(a: Anatomy) -> Iterator[tuple[str, str]]:
    yield "architecture", f"{a.model_type}, {a.layers} layers"
    if a.active_heads != a.heads:
        always = f", {a.shared_heads} of them for every token" if a.shared_heads else ""
        yield "attention heads", f"{a.active_heads} of {a.heads} compute for a token{always}"
    if a.prompt_attention != "causal":
        yield "attention to a prompt", "its tokens see all of it (prompt_attention=bidirectional)"
    yield "parameters", f"{_count(a.parameters)}, without MTP layers"
    yield "active per token", f"{_count(a.active_parameters)} ({a.active_parameters / a.parameters:.1%})"
    if a.experts:
        e = a.experts
        yield "experts", f"{e.routed} routed + {e.shared} shared, of width {e.width}, in {e.layers} of the layers"
        groups = f", from {e.groups_per_token} of {e.groups} expert groups" if e.groups > 1 else ""
        yield "experts per token", f"{e.per_token} routed{groups} + {e.shared} shared"
    else:
        yield "experts", "none: dense"
    unused = "; the first drafts, the others are kept" if a.mtp_depth > 1 else ""
    yield "MTP layers", f"{a.mtp_depth} ({_count(a.mtp_parameters)}{unused})" if a.mtp_depth else "none"
    if a.cache_numbers is None or a.prefill_flops is None or a.decode_flops is None:
        yield "cache and FLOPs", "not counted: some layers do not attend to all tokens of a text"
    else:
        yield "cache per token", f"{4 * a.cache_numbers:,} bytes (bfloat16: {2 * a.cache_numbers:,})"
        yield "FLOPs per token, prefill", f"{_count(a.prefill_flops)} (mean over a prompt of {a.context:,} tokens)"
        yield "FLOPs per token, decode", f"{_count(a.decode_flops)} (after {a.context:,} tokens)"
    reached = f"reached at rank {a.lora_rank_within_aim}" if a.lora_rank_within_aim else "out of reach at this size"
    aim = f"aim: {LORA_AIM:.0%}, {reached}" if a.lora_share > LORA_AIM else ""
    share = f"{a.lora_share:.2%} of the parameters" + (f"; {aim}" if aim else "")
    yield f"LoRA of rank {a.lora_rank} trains", f"{_count(a.lora_parameters)}, {share}"
    yield "on", reach_in_words(a.lora_reach, a.lora_left)
    if a.mtp_depth:
        yield "", "and the MTP head in full, unless lora.targets names mtp"


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.2f} {letter}"
    return f"{number:,.0f}"
