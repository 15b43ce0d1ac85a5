"""What a policy has lost in few bits: size, perplexity, top-1 agreement and accuracy, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from grpo.cli.commands import eval_report
from grpo.cli.commands.eval import ModelEvaluation
from grpo.cli.quantize.options import QuantizeConfig
from grpo.config.json_file import write_json
from grpo.run import hardware
from policies.conversion.parity import Fidelity

REPORT = "quantization_report.json"


@dataclass(frozen=True)
class Quantization:
    """What quantising has done. `fidelity` is of the files that were written, read again by stock transformers, on text
    that nothing was measured on. `bytes_before` and `bytes_after` are those of the safetensors; `kept` names the
    matrices that keep their precision. `evaluations` are none, or before and after."""

    config: QuantizeConfig
    destination: str
    bytes_before: int
    bytes_after: int
    kept: list[str]
    fidelity: Fidelity
    seconds: float
    versions: dict[str, str]
    evaluations: list[ModelEvaluation] = field(default_factory=list)

    @property
    def perplexity_change(self) -> float:
        """The change as a share: .03 is 3 %."""
        return self.fidelity.perplexity / self.fidelity.dense_perplexity - 1


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
    if result.kept:
        why = f"group_size={config.group_size} does not divide their rows"
        say(f"{len(result.kept)} matrices keep their precision, such as {result.kept[0]}: {why}")
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
        "heldout": asdict(result.fidelity) | {"perplexity_change": result.perplexity_change},
        "accuracy": eval_report.paired_as_json(both) if both else None,
        "matrices_kept": result.kept,
        "seconds": result.seconds,
        "options": result.config.model_dump(mode="json"),
        "environment": hardware.describe() | result.versions,
    }


def write(result: Quantization, folder: Path) -> None:
    """Write the report beside the weights."""
    write_json(folder / REPORT, as_json(result))
