"""`quartet quantize SRC DST`: measure, quantise, write, read the files again with transformers, compare, and tell."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from grpo.cli.commands import eval_report
from grpo.cli.commands.eval import ModelEvaluation, evaluate_model
from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.config.inference import EvalConfig, MeasuredConfig
from grpo.cli.quantize import compressor
from grpo.cli.quantize.options import QuantizeConfig
from grpo.data.calibration_text import WINDOW, CalibrationText, calibration_text
from grpo.data.prompts import PromptTemplate
from grpo.data.trained_on import record_trained_on, trained_on
from grpo.run import hardware
from policies.conversion.dense import LICENCE_FILES, new_folder
from policies.conversion.parity import Fidelity, fidelity
from policies.files.atomic import heed_umask
from policies.files.packed import is_packed
from policies.layout import find_file
from policies.policy import Policy, PolicyError, context_of, read_config, read_tokenizer
from rewards.config.json_file import write_json
from rewards.data.examples import Example
from rewards.data.leakage import in_held_out, problem_fingerprint

REPORT = "quantization_report.json"


@dataclass(frozen=True)
class Quantization:
    """Quantising has done this. `fidelity` is of the files that were written, read again by stock transformers, on text
    that nothing was measured on. `bytes_before` and `bytes_after` are those of the safetensors; `kept` names the
    matrices that keep their precision. `evaluations` are none, or before and after."""

    config: QuantizeConfig
    destination: str
    bytes_before: int
    bytes_after: int
    whole: list[str]
    fidelity: Fidelity
    seconds: float
    versions: dict[str, str]
    evaluations: list[ModelEvaluation] = field(default_factory=list)

    @property
    def perplexity_change(self) -> float:
        """The perplexity has changed by this share: .03 is 3 %."""
        return self.fidelity.perplexity / self.fidelity.dense_perplexity - 1


class Quantizer:
    """Quantises the policy of `config`, which stays as it is, and measures what that costs."""

    def __init__(self, config: QuantizeConfig, console: Console) -> None:
        self.config, self.console, self.use = config, console, PolicyInUse(config)
        self.template = PromptTemplate(config.data.template)

    def quantize(self, destination: Path) -> Quantization:
        """Writes `destination`, complete or not at all. What is wrong with the packages, the text, the source or the
        destination is raised before weights are read."""
        compressor.require_packages()
        with new_folder(destination) as folder:
            result = self._write(folder, destination)
            write_json(folder / REPORT, as_json(result))
            heed_umask(folder)
        return result

    def _write(self, folder: Path, destination: Path) -> Quantization:
        """Write the files that `destination` will hold, and compare them with the policy that they come from."""
        config, source = self.config, self.use.source
        text = self._text()
        problems = {self._fingerprint(example) for example in text.examples}
        evaluations = (
            [self._evaluate(source.folder, "before", problems)] if "name" in config.data.model_fields_set else []
        )
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
            whole=whole,
            fidelity=fidelity(policy.trunk, small.trunk.to(policy.device), text.held_out),
            seconds=seconds,
            versions={name: metadata.version(name) for name in ("llmcompressor", "compressed-tensors")},
            evaluations=evaluations,
        )

    def _text(self) -> CalibrationText:
        """Returns the text that is measured on, without the share that a run holds out."""
        config, base = self.config, self.use.source.base
        shape, share = read_config(base), config.data.held_out
        if is_packed(shape):
            raise PolicyError(f"model={config.model!r} is quantised already; name the policy that it was made from")

        def held_out(example: Example) -> bool:
            return share is not None and in_held_out(self._fingerprint(example), share)

        return calibration_text(
            config.calibrate,
            read_tokenizer(base),
            tokens=config.calibrate_tokens,
            held_out_tokens=config.held_out_tokens,
            window=min(WINDOW, context_of(shape)),
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
        options = self.config.model_dump(include=set(MeasuredConfig.model_fields))
        output = self.config.output and self.config.output / which
        return evaluate_model(EvalConfig(**options | {"model": model, "output": output}), self.console, met=met)

    def _copy_beside(self, folder: Path, problems: set[str]) -> None:
        """Copies the licence, and names the problems that were met, which must not be evaluated."""
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


def show(result: Quantization, console: Console) -> None:
    """Print a table of 80 columns, and that of the evaluations where there are any."""
    config, figures = result.config, result.fidelity
    columns = ("", Column("before", justify="right"), Column("after", justify="right"), "")
    title = f"{config.method}, {config.bits} bits, groups of {config.group_size}"
    table = Table(*columns, title=title, title_justify="left")
    before, after = (size / 2**20 for size in (result.bytes_before, result.bytes_after))
    table.add_row("weights, MiB", f"{before:,.1f}", f"{after:,.1f}", f"{after / before - 1:+.1%}")
    change = f"{result.perplexity_change:+.2%}"
    table.add_row("perplexity", f"{figures.dense_perplexity:.3f}", f"{figures.perplexity:.3f}", change)
    table.add_row("top-1 agreement", "", f"{figures.top1_agreement:.2%}", "")
    table.add_row("mean KL, nats a token", "", f"{figures.kl_mean:.4f}", "")
    console.print(table)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"on {figures.num_tokens:,} tokens of {config.calibrate}, held out; quantised in {result.seconds:.0f} s")
    if result.whole:
        why = f"group_size={config.group_size} does not divide their rows"
        say(f"{len(result.whole)} matrices keep their precision, such as {result.whole[0]}: {why}")
    for evaluation in result.evaluations:
        eval_report.show(evaluation, console)
    if result.evaluations:
        eval_report.show_paired(result.evaluations[0], result.evaluations[1:], console)
    say(f"written to {result.destination}")


def as_json(result: Quantization) -> dict[str, Any]:
    """Returns all that the table shows, and how it was measured (contract 11)."""
    both = result.evaluations
    return {
        "weights_bytes": {"before": result.bytes_before, "after": result.bytes_after},
        "held_out": asdict(result.fidelity) | {"perplexity_change": result.perplexity_change},
        "accuracy": eval_report.paired_as_json(both) if both else None,
        "matrices_kept": result.whole,
        "seconds": result.seconds,
        "options": result.config.model_dump(mode="json"),
        "environment": hardware.describe() | result.versions,
    }
