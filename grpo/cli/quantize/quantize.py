"""`quartet quantize SRC DST`: measure, quantise, write, read the files again with transformers, and compare."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from grpo.cli.commands.eval import ModelEvaluation, evaluate_model
from grpo.cli.config.inference import EvalConfig
from grpo.cli.quantize import compressor, report
from grpo.cli.quantize.options import QuantizeConfig
from grpo.cli.quantize.report import Quantization
from grpo.data.calibration_text import calibration_text
from grpo.data.examples import Example
from grpo.data.leakage import in_holdout, problem_fingerprint, record_trained_on, trained_on
from grpo.data.prompts import PromptTemplate
from grpo.source.policy_source import PolicySource, find_policy, load_found
from grpo.task.check import check_plan
from policies.conversion.dense import LICENCE_FILES, new_folder
from policies.conversion.parity import Fidelity, fidelity
from policies.files.packed import is_packed
from policies.layout import find_file
from policies.policy import Policy, PolicyError, read_config, read_tokenizer


def quantize(destination: Path, config: QuantizeConfig, console: Console) -> Quantization:
    """Writes `destination`, complete or not at all. `config.model` is quantised, and stays as it is.

    Raises ValueError where packages are missing or the text is evaluation data or too short, PolicyError for a source
    that cannot be quantised, FileExistsError for a destination that is not empty; all of them before weights are read.
    """
    source = find_policy(config.model)
    check_plan(config, source)
    compressor.require_packages()
    with new_folder(destination) as folder:
        shape = read_config(source.base)
        if is_packed(shape):
            raise PolicyError(f"model={config.model!r} is quantised already; name the policy that it was made from")
        text = calibration_text(
            config.calibrate,
            read_tokenizer(source.base),
            tokens=config.calibrate_tokens,
            heldout_tokens=config.heldout_tokens,
            window=min(config.window, shape.max_position_embeddings),
            left_out=lambda example: bool(config.holdout) and _is_held_out(example, config),
        )
        read = {_fingerprint(example, config) for example in text.examples}
        evaluates = "data" in config.model_fields_set
        before = [_evaluate(source.folder, config, "before", console, read)] if evaluates else []
        started = time.perf_counter()
        policy = load_found(source, config)
        size = sum(tensor.nbytes for tensor in dict(policy.named_parameters()).values())
        kept = compressor.quantize(policy, text.windows, config)
        compressor.save(policy, folder)
        seconds = time.perf_counter() - started
        del policy
        _copy_beside(source, folder, read)
        result = Quantization(
            config=config,
            destination=str(destination),
            bytes_before=size if source.checkpoint else _bytes(Path(source.folder)) or size,
            bytes_after=_bytes(folder),
            kept=kept,
            fidelity=_compare(source, folder, text.heldout, config),
            seconds=seconds,
            versions={name: metadata.version(name) for name in ("llmcompressor", "compressed-tensors")},
            evaluations=before and [*before, _named(_evaluate(str(folder), config, "after", console, ()), destination)],
        )
        report.write(result, folder)
    return result


def _fingerprint(example: Example, config: QuantizeConfig) -> str:
    """As evaluation has it, where the example has the columns of its template."""
    try:
        content = PromptTemplate(config.template, config.system_prompt, user_turn=config.user_turn).content(example)
    except ValueError:
        content = example.question
    return problem_fingerprint(content)


def _is_held_out(example: Example, config: QuantizeConfig) -> bool:
    assert config.holdout is not None
    return in_holdout(_fingerprint(example, config), config.holdout, config.holdout_seed)


def _evaluate(
    model: str, config: QuantizeConfig, which: str, console: Console, met: Collection[str]
) -> ModelEvaluation:
    """As `quartet eval` does. Problems that were `met` are refused."""
    options = {name: getattr(config, name) for name in EvalConfig.model_fields}
    output = config.output and config.output / which
    return evaluate_model(EvalConfig(**options | {"model": model, "output": output}), console, met=met)


def _named(evaluation: ModelEvaluation, destination: Path) -> ModelEvaluation:
    """It was of a folder that has its name at the end only."""
    name = str(destination)
    source = replace(evaluation.source, folder=name, base=name)
    return replace(evaluation, source=source, config=evaluation.config.model_copy(update={"model": name}))


def _compare(source: PolicySource, folder: Path, windows: list[Tensor], config: QuantizeConfig) -> Fidelity:
    policy, small = load_found(source, config), Policy.load(folder, getattr(torch, config.dtype))
    return fidelity(policy.trunk, small.trunk.to(policy.device), windows)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _copy_beside(source: PolicySource, folder: Path, read: Collection[str]) -> None:
    """The licence, and the problems that the policy was trained on or measured on, which must not be evaluated."""
    for name in LICENCE_FILES:
        if found := find_file(source.base, name):
            shutil.copy(found, folder / name)
    if met := trained_on(source.folder) | set(read):
        record_trained_on(folder, met)
