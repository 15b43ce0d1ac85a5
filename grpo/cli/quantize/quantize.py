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

from grpo.cli.commands.eval import ModelEvaluation, evaluate_model
from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.config.inference import EvalConfig
from grpo.cli.quantize import compressor, report
from grpo.cli.quantize.options import QuantizeConfig
from grpo.cli.quantize.report import Quantization
from grpo.data.calibration_text import CalibrationText, calibration_text
from grpo.data.examples import Example
from grpo.data.leakage import in_holdout, problem_fingerprint, record_trained_on, trained_on
from grpo.data.prompts import PromptTemplate
from policies.conversion.dense import LICENCE_FILES, new_folder
from policies.conversion.parity import fidelity
from policies.files.packed import is_packed
from policies.layout import find_file
from policies.policy import Policy, PolicyError, read_config, read_tokenizer


def quantize(destination: Path, config: QuantizeConfig, console: Console) -> Quantization:
    """Writes `destination`, complete or not at all. `config.model` is quantised, and stays as it is. What is wrong with
    the packages, the text, the source or the destination is raised before weights are read."""
    quantizer = _Quantizer(config, console)
    compressor.require_packages()
    with new_folder(destination) as folder:
        result = quantizer.write(folder, destination)
        report.write(result, folder)
    return result


class _Quantizer:
    """Quantises the policy of `config`, and measures what that costs."""

    def __init__(self, config: QuantizeConfig, console: Console) -> None:
        self.config, self.console, self.use = config, console, PolicyInUse(config)
        self.template = PromptTemplate(config.template, config.system_prompt, user_turn=config.user_turn)

    def write(self, folder: Path, destination: Path) -> Quantization:
        """Write the files that `destination` will hold, and compare them with the policy that they come from."""
        config, source = self.config, self.use.source
        text = self._text()
        problems = {self._fingerprint(example) for example in text.examples}
        evaluations = [self._evaluate(source.folder, "before", problems)] if "data" in config.model_fields_set else []
        started = time.perf_counter()
        policy = self.use.load()
        size = sum(tensor.nbytes for tensor in dict(policy.named_parameters()).values())
        whole = compressor.quantize(
            policy, text.windows, config.method, bits=config.bits, group_size=config.group_size, seed=config.seed
        )
        compressor.save(policy, folder)
        seconds = time.perf_counter() - started
        del policy
        self._copy_beside(folder, problems)
        if evaluations:
            evaluations.append(_named(self._evaluate(str(folder), "after"), destination))
        policy, small = self.use.load(), Policy.load(folder, getattr(torch, config.dtype))
        return Quantization(
            config=config,
            destination=str(destination),
            bytes_before=size if source.checkpoint else _bytes(Path(source.folder)) or size,
            bytes_after=_bytes(folder),
            kept=whole,
            fidelity=fidelity(policy.trunk, small.trunk.to(policy.device), text.heldout),
            seconds=seconds,
            versions={name: metadata.version(name) for name in ("llmcompressor", "compressed-tensors")},
            evaluations=evaluations,
        )

    def _text(self) -> CalibrationText:
        """Returns the text that is measured on, without the share that a run holds out."""
        config, base = self.config, self.use.source.base
        shape, share = read_config(base), config.holdout
        if is_packed(shape):
            raise PolicyError(f"model={config.model!r} is quantised already; name the policy that it was made from")

        def held_out(example: Example) -> bool:
            return share is not None and in_holdout(self._fingerprint(example), share, config.holdout_seed)

        return calibration_text(
            config.calibrate,
            read_tokenizer(base),
            tokens=config.calibrate_tokens,
            heldout_tokens=config.heldout_tokens,
            window=min(config.window, shape.max_position_embeddings),
            left_out=held_out,
        )

    def _fingerprint(self, example: Example) -> str:
        """Returns the fingerprint that evaluation gives to an example with the columns of its template."""
        try:
            return problem_fingerprint(self.template.content(example))
        except ValueError:
            return problem_fingerprint(example.question)

    def _evaluate(self, model: str, which: str, met: Collection[str] = ()) -> ModelEvaluation:
        """Evaluate as `quartet eval` does. Problems that were `met` are refused."""
        options = self.config.model_dump(include=set(EvalConfig.model_fields))
        output = self.config.output and self.config.output / which
        return evaluate_model(EvalConfig(**options | {"model": model, "output": output}), self.console, met=met)

    def _copy_beside(self, folder: Path, problems: set[str]) -> None:
        """Copies the licence, and names the problems that were trained on or measured on, which must not be
        evaluated."""
        for name in LICENCE_FILES:
            if file := find_file(self.use.source.base, name):
                shutil.copy(file, folder / name)
        if met := trained_on(self.use.source.folder) | problems:
            record_trained_on(folder, met)


def _named(evaluation: ModelEvaluation, destination: Path) -> ModelEvaluation:
    """Returns the evaluation of a folder that has this name at the end only."""
    name = str(destination)
    source = replace(evaluation.source, folder=name, base=name)
    return replace(evaluation, source=source, config=evaluation.config.model_copy(update={"model": name}))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
