"""Reading and writing a policy's folder, with messages that name what is wrong in it.

The folder holds safetensors in the DeepSeek-V3 layout (`policies.layout`), config.json and the tokenizer. Stock
transformers loads the trunk from it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from policies import four_bit, lora, sharding
from policies.bounds import read_fields
from policies.files import gguf
from policies.files.atomic import heed_umask, write_folder
from policies.files.checksums import CHECKSUMS, fault
from policies.layout import PolicyError, WeightFiles, auto_class, find_file, is_language_model
from policies.mtp import MTPHead

LOGGER = logging.getLogger(__name__)
# How pictures become numbers; a model that reads them is not loaded without.
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass
class Checkpoint:
    """What a folder holds of a policy. The fields are those of `policies.policy.Policy`."""

    trunk: PreTrainedModel
    mtp: MTPHead | None
    tokenizer: PreTrainedTokenizerBase
    draft_ids: Tensor | None = None
    further_mtp: dict[str, Tensor] = field(default_factory=dict)
    processor: dict[str, bytes] = field(default_factory=dict)


def load(
    source: str | Path,
    dtype: torch.dtype,
    *,
    add_mtp: bool,
    seed: int,
    layout: DistributedConfig | None = None,
    in_4_bits: bool = False,
) -> Checkpoint:
    """Reads a policy, see `Policy.load`."""
    from policies import contradictions, mtp_layers
    from policies.files import packed

    config = read_config(source, writes=True)
    note_own_code(str(source))
    files = WeightFiles(source)
    codes = packed.is_packed(config)
    if gguf.file_of(source) and (in_4_bits or layout):
        raise PolicyError(
            f"model={str(source)!r} is a GGUF file, whose weights are made dense and whole: leave "
            f"{'lora.base' if in_4_bits else 'learner.parallel'} out"
        )
    if codes and in_4_bits:
        raise PolicyError(f"model={str(source)!r} is quantised already; leave lora.base out, or name the original")
    check_weights(files, config)
    tokenizer = read_tokenizer(source)
    trunk, report = _load_trunk(source, config, dtype, layout, in_4_bits, packed.loading(source) if codes else {})
    if codes or not isinstance(config, DeepseekV3Config):
        contradictions.check_report(source, config, report)
    contradictions.refuse_untied(source, trunk)
    keep_stored(files, trunk)
    if not isinstance(trunk, DeepseekV3ForCausalLM):
        places = {name: find_file(files.source, name) for name in PROCESSOR if "text_config" in config.sub_configs}
        processor = {name: Path(place).read_bytes() for name, place in places.items() if place}
        return Checkpoint(trunk, None, tokenizer, processor=processor)
    head, further = mtp_layers.stored_head(files, trunk, dtype, fresh=add_mtp, seed=seed)
    ids = None if head is None else mtp_layers.read_draft_vocabulary(files.source, trunk.config.vocab_size)
    return Checkpoint(trunk, head, tokenizer, ids, further)


def _load_trunk(
    source: str | Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    layout: DistributedConfig | None,
    in_4_bits: bool,
    codes: dict[str, Any],
) -> tuple[PreTrainedModel, dict]:
    """The model, and the report of transformers on its tensors. `codes`: how packed weights are read."""
    options = codes | (sharding.layout_arguments(source, layout) if layout else {})
    options |= four_bit.loading(dtype) if in_4_bits else {}
    options |= {"quantization_config": GgufConfig(dequantize=True)} if gguf.file_of(source) else {}
    try:
        with _quiet_loading() as logged, gguf.named(source) as named:
            trunk, report = auto_class(config).from_pretrained(
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `check_report` refuses them by name
                output_loading_info=True,
                **named,
                **options,
            )
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from error
    except RuntimeError as error:  # experts that cannot be stacked; only the log of transformers names them
        unfit = re.findall(r"^(\S+) +\| CONVERSION", "\n".join(record.getMessage() for record in logged), re.M)
        if not unfit:
            raise _unusable(source, "config.json or a weight", error) from error
        raise PolicyError(f"model={str(source)!r} has experts missing or of unequal shapes: {unfit[:5]}") from error
    except Exception as error:
        raise _unusable(source, "config.json or a weight", error) from error
    if in_4_bits or codes:
        four_bit.as_ordinary_model(trunk)
    return trunk, report


@torch.no_grad()
def keep_stored(files: WeightFiles, trunk: PreTrainedModel) -> None:
    """Put back what some classes of transformers overwrite once they have read it: the embedding of the padding token
    (Youtu) and buffers of routers (ZAYA). A policy that was trained would not be the one that was saved."""
    kept = trunk.state_dict().keys() & files.shapes.keys()
    for name, buffer in trunk.named_buffers():
        if name in kept and files.shapes[name] == tuple(buffer.shape) and not isinstance(buffer, DTensor):
            buffer.copy_(files.read(name)[name])
    for name, module in trunk.named_modules():
        stored = f"{name}.weight"
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and stored in files.shapes:
            row, whole = module.padding_idx, module.weight
            if not isinstance(whole, DTensor) and files.shapes[stored] == tuple(whole.shape):
                whole[row].copy_(files.read_row(stored, row))


def save(folder: Path, policy: Checkpoint) -> None:
    """Writes a policy, see `Policy.save`."""
    from policies import mtp_layers

    trunk, config = policy.trunk, policy.trunk.config
    state, further = lora.merged_state(trunk), mtp_layers.mtp_layers(config, policy.further_mtp)
    if policy.mtp is not None:
        state |= mtp_layers.head_state(config, lora.merged_state(policy.mtp)) | policy.further_mtp
    if isinstance(trunk, DeepseekV3ForCausalLM):
        config.num_nextn_predict_layers = 0 if policy.mtp is None else 1 + len(further)
    parts = sharding.gathered_parts(state)
    if not sharding.leads():
        for _ in parts:
            pass
        return
    try:
        with write_folder(folder) as partial:
            with _quiet_loading():
                _write(trunk, parts, partial)
            heed_umask(partial)
            policy.tokenizer.save_pretrained(partial)
            for name, content in policy.processor.items():
                (partial / name).write_bytes(content)
            if policy.draft_ids is not None:
                mtp_layers.write_draft_vocabulary(partial, policy.draft_ids)
    except (OSError, SafetensorError) as error:
        what = f"cannot write the policy to {folder}: {error}; needs {sum(t.nbytes for t in state.values())} bytes"
        raise PolicyError(f"{what}: make room or use another disk; what was saved before is intact") from error


def _write(trunk: PreTrainedModel, parts: Iterable[dict[str, Tensor]], folder: Path) -> None:
    """Writes the tensors as transformers does: one file for each part, with an index where there are several."""
    files: list[Path] = []
    for part in parts:
        trunk.save_pretrained(folder, state_dict=part, max_shard_size="1TB")
        files.append((folder / SAFE_WEIGHTS_NAME).rename(folder / f"part_{len(files)}"))
    names: dict[str, str] = {}
    for i, file in enumerate(files):
        number = f"-{i + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = file.rename(folder / SAFE_WEIGHTS_NAME.replace(".", f"{number}.", 1))
        with safe_open(path, "pt") as stored:
            names |= dict.fromkeys(stored.keys(), path.name)
    if len(files) > 1:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1))


def check_policy(folder: Path) -> None:
    """Raises PolicyError if a file of a policy that a run has saved is not what the run wrote.

    A folder without digests passes: it comes from another tool.
    """
    if (folder / CHECKSUMS).is_file() and (damage := fault(folder, CHECKSUMS)):
        raise PolicyError(
            f"model={str(folder)!r} is damaged: {damage}; restore the file from a copy, or delete "
            f"{folder / CHECKSUMS} if you have changed the policy yourself"
        )


def check_files(folder: Path) -> None:
    """Raises PolicyError for what `load` refuses of a folder, as far as the headers of its files tell."""
    config = read_config(folder, writes=True)
    check_weights(WeightFiles(folder), config)
    read_tokenizer(folder)


def check_weights(files: WeightFiles, config: PretrainedConfig) -> None:
    """Raises PolicyError for weights that contradict their configuration, before they are loaded. Only an LM head that
    should be the embedding is read."""
    from policies import contradictions
    from policies.files import packed

    if not files.shapes:
        contradictions.refuse_adapter(files.source)
    if not files.shapes or packed.is_packed(config):
        return
    if isinstance(config, DeepseekV3Config):
        contradictions.check_tensors(files, config)
    elif getattr(config, "quantization_config", None) is None:
        contradictions.refuse_larger(files, config)
    contradictions.check_lm_head(files, config)


def read_config(source: str | Path, *, writes: bool = False) -> PretrainedConfig:
    """The configuration of a folder, a GGUF file or hub id. Raises PolicyError, which names fields that contradict each
    other, and where it `writes`, for a model of a kind that writes no text."""
    from policies.contradictions import contradictions, refuse_type

    _refuse_absent(source)
    refuse_type(source)
    of_gguf = gguf.file_of(source)
    try:
        with gguf.named(source) as named:
            config = AutoConfig.from_pretrained(**named, trust_remote_code=False)
        faults = list(contradictions(config))
    except Exception as error:  # a damaged file can make transformers raise anything
        if isinstance(error, OSError | ValueError) and not of_gguf:
            raise _unreachable(source, error) from error
        raise _unusable(source, of_gguf.name if of_gguf else "config.json", error) from error
    if writes and not is_language_model(config):
        raise PolicyError(
            f"model={str(source)!r} is of type {config.model_type!r}, of which transformers makes no causal language "
            "model (AutoModelForCausalLM): use another model, or the language model inside it"
        )
    if faults:
        raise PolicyError(f"model={str(source)!r}: config.json contradicts itself: " + "; ".join(faults))
    return config


def own_code(source: str) -> str:
    """A sentence for a checkpoint that brings code of its own, which is never run; empty for the others."""
    file = find_file(source, "config.json")
    fields = read_fields(Path(file)) if file else {}
    if not fields.get("auto_map"):
        return ""
    return (
        f"model={source!r} brings code (auto_map in config.json), which is never run: transformers' own "
        f"{fields.get('model_type')} computes it; if the two differ, so do their log-probabilities"
    )


@cache
def note_own_code(source: str) -> None:
    """Log `own_code` once in a process."""
    if words := own_code(source):
        LOGGER.warning(words)


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a GGUF file or hub id. Raises PolicyError if it is missing or damaged, or if the
    generation config is damaged, which transformers ignores silently."""
    from policies.files import hub

    name = "generation_config.json"
    _refuse_absent(source)
    try:
        if find_file(str(source), name):
            repository, revision = hub.split(source)
            GenerationConfig.from_pretrained(repository, revision=revision or "main")
        name = "its tokenizer"
        with gguf.named(source) as named:
            tokenizer = AutoTokenizer.from_pretrained(**named, trust_remote_code=False)
        tokenizer.encode("2 + 3 = ?")  # some damage shows when it is used
        return tokenizer
    except Exception as error:  # a damaged file can make transformers and tokenizers raise anything
        raise PolicyError(
            f"model={str(source)!r}: {name} is missing or damaged ({error}); copy or download it again"
        ) from error


def _refuse_absent(source: str | Path) -> None:
    from policies.files import hub

    if why := hub.why_absent(source):
        raise _unreachable(source, why)
    if why := gguf.why_unreadable(source):
        raise PolicyError(f"model={str(source)!r}: {why}")


def _unusable(source: str | Path, what: str, error: Exception) -> PolicyError:
    return PolicyError(f"model={str(source)!r}: {what} is not usable: {type(error).__name__}: {error}")


def _unreachable(source: str | Path, error: Exception | str) -> PolicyError:
    return PolicyError(
        f"model={str(source)!r} is neither a preset, a checkpoint folder nor a reachable hub id: {error}"
    )


@contextmanager
def _quiet_loading() -> Iterator[list[logging.LogRecord]]:
    """Hides what transformers logs, such as the MTP layer's keys as unexpected, and yields it instead."""
    library, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level, handlers, propagate = library.level, library.handlers, library.propagate
    handler = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
    library.handlers, library.propagate = [handler], False  # transformers propagates where CI is set
    library.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield handler.buffer
    finally:
        library.handlers, library.propagate = handlers, propagate
        library.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
