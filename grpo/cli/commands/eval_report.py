"""The table and the JSON of `quartet eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from grpo.cli.commands.eval import COMPLETIONS, ModelEvaluation
from grpo.evaluation.evaluate import Evaluation, failure_kinds
from grpo.evaluation.paired import compare
from grpo.run import hardware
from review.readers.machine import caption
from review.statistics.estimates import INTERVAL_METHOD, Estimate
from review.statistics.paired import PairedDifference

FAILURES_SHOWN = 5
FAILURES_KEPT = 100
PER_PROBLEM = "by_problem", "rewards_by_problem"
OTHERWISE = ("groups", "failures", *PER_PROBLEM, "correct", "interval", "pass_at", "majority_at")


def show(evaluation: ModelEvaluation, console: Console) -> None:
    """Prints a row for every figure, a column for every way of sampling; at most 80 columns wide."""
    config, results = evaluation.config, evaluation.results
    columns = [_cells(result) for result in results.values()]
    title = f"{config.data.name}, {evaluation.split}: {evaluation.problems:,} problems"
    headings = [Column(name, justify="right") for name in results]
    table = Table("(95 % interval)", *headings, title=title, title_justify="left")
    for label in dict.fromkeys(label for cells in columns for label in cells):
        table.add_row(label, *(cells.get(label, "") for cells in columns))
    console.print(table)
    for line in _notes(evaluation):
        console.print(line, markup=False, highlight=False, soft_wrap=True)  # paths are not broken into lines


def show_paired(first: ModelEvaluation, others: Sequence[ModelEvaluation], console: Console) -> None:
    """Prints for each way of sampling and each policy after the first its difference from the first one."""
    title = f"against {escape(str(first.config.model))}, problem by problem"
    numbers = [Column(name, justify="right") for name in ("difference (95 % interval)", "problems", "unpaired")]
    table = Table("policy", "", *numbers, title=title, title_justify="left")
    reasons, points = [], []
    for other in others:
        for way, pair in pairs(first, other).items():
            more = "-" if pair.unpaired is None else f"{pair.unpaired:.1f} x"
            interval = "(none)" if pair.low is None else f"({pair.low:+.3f} to {pair.high:+.3f})"
            name, difference = escape(str(other.config.model)), f"{pair.value:+.3f} {interval}"
            table.add_row(name, way, difference, f"{pair.problems:,}", more)
            if pair.why_no_interval:
                reasons.append(pair.why_no_interval)
                points.append(f"{name}, {way}: {_points(pair)}")
    console.print(table)
    for line in (*dict.fromkeys(reasons), *points):
        console.print(line, highlight=False, soft_wrap=True)
    console.print("unpaired: how many times as many problems the same interval would need without common noise")


def _points(pair: PairedDifference) -> str:
    """The differences problem by problem, in a few numbers."""
    spread = " ".join(f"{value:+.3g}" for value in pair.points)
    counts = f"higher on {pair.higher:,} problems, lower on {pair.lower:,}, of {pair.problems:,}"
    return f"{counts}; lowest, quartiles and highest difference {spread}"


def pairs(first: ModelEvaluation, other: ModelEvaluation) -> dict[str, PairedDifference]:
    """Returns the difference of each way of sampling, over the problems that both have."""
    return {way: compare(first.results[way], result) for way, result in other.results.items()}


def _cells(result: Evaluation) -> dict[str, str]:
    """Returns the figures by label, in the order of the table."""
    cells = {}
    if result.interval is not None and result.accuracy is not None:
        low, high = result.interval
        cells["accuracy"] = f"{result.accuracy:.3f} ({low:.3f}-{high:.3f})"
        cells["correct"] = f"{result.correct:,} of {result.completions:,}"
    cells |= {f"pass@{k}": _words(passed) for k, passed in result.pass_at.items() if k > 1}
    cells |= {f"majority of {k}": _words(vote) for k, vote in result.majority_at.items() if k > 1}
    cells["reward, mean"] = "-" if result.reward_mean is None else f"{result.reward_mean:.3f}"
    if len(result.parts) > 1:
        cells |= {f"  {name}": f"{value:.3f}" for name, value in result.parts.items()}
    cells |= {
        "completion tokens, mean": f"{result.length_mean:.1f}",
        "cut at the limit": f"{result.clipped:.1%}",
        "tokens per second": f"{result.tokens_per_second:,.0f}",
        "tokens per forward": f"{result.tokens_per_forward:.2f}",
    }
    if result.acceptance:
        rates = " ".join(f"{rate:.2f}".removeprefix("0") for rate in result.acceptance)
        cells["drafts accepted, by depth"] = rates
        cells["fallback rate"] = f"{result.fallback_rate:.1%}"
    if result.without_mark:
        failed = result.without_mark - result.abstained
        cells["without a mark"] = f"{result.abstained:,} abstained, {failed:,} failed"
    return cells


def _words(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f}-{estimate.high:.3f})"


def _notes(evaluation: ModelEvaluation) -> list[str]:
    source, perplexity = evaluation.source, evaluation.perplexity
    notes = [f"policy: {source.folder} ({source.meaning})"]
    if evaluation.trained_on:
        met = f"{evaluation.trained_on:,} of the {evaluation.problems:,} problems"
        notes.append(f"NOT HELD OUT: the policy was trained on {met}")
    if evaluation.no_accuracy:
        notes.append(evaluation.no_accuracy)
    if perplexity:
        scored = f"{perplexity.tokens:,} tokens"
        scored += f", {perplexity.too_long} solutions too long" if perplexity.too_long else ""
        notes.append(f"perplexity of the gold solutions: {perplexity.value:.3f} ({scored})")
    memory = " and ".join(f"{gib:.2f} GiB ({where})" for where, gib in evaluation.peak_memory_gib.items())
    notes.append(f"peak memory: {memory}")
    failures = [failure for result in evaluation.results.values() for failure in result.failures]
    for kind, count in failure_kinds(failures).items():
        notes.append(f"REWARD FAILED {count:,} times ({kind})")
    notes += [f"  {failure}" for failure in failures[:FAILURES_SHOWN]]
    if evaluation.without_any_mark:
        notes.append("no completion has a mark: this evaluation says nothing about the policy")
    if evaluation.config.output:
        notes.append(f"every completion: {evaluation.config.output / COMPLETIONS}")
    return [*notes, caption(hardware.describe())]


def paired_as_json(evaluations: Sequence[ModelEvaluation]) -> dict[str, Any]:
    """Returns every policy as `as_json` has it, and the differences from the first one."""
    first, *others = evaluations
    paired = [{"model": other.config.model} | {w: vars(p) for w, p in pairs(first, other).items()} for other in others]
    return {"models": [as_json(evaluation) for evaluation in evaluations], "against_first": paired}


def as_json(evaluation: ModelEvaluation) -> dict[str, Any]:
    """Returns what the table shows and how it was measured, with the machine (contract 11)."""
    config, source, perplexity = evaluation.config, evaluation.source, evaluation.perplexity
    return {
        "model": config.model,
        "policy": {"folder": source.folder, "meaning": source.meaning},
        "data": config.data.name,
        "split": evaluation.split,
        "problems": evaluation.problems,
        "trained_on": evaluation.trained_on,
        "no_accuracy": evaluation.no_accuracy,
        "evaluations": {name: _values(result) for name, result in evaluation.results.items()},
        "interval_method": INTERVAL_METHOD,
        "gold_perplexity": perplexity and (vars(perplexity) | {"perplexity": perplexity.value}),
        "peak_memory_gib": evaluation.peak_memory_gib,
        "rewards": evaluation.rewards,
        "options": config.model_dump(mode="json"),
        "environment": hardware.describe(),
    }


def _values(result: Evaluation) -> dict[str, Any]:
    """Returns the figures, without those of right and wrong completions where there is no accuracy."""
    values = {name: value for name, value in vars(result).items() if name not in OTHERWISE}
    if result.interval is not None:
        values |= {
            "correct": result.correct,
            "accuracy": result.accuracy,
            "interval_95": list(result.interval),
            "pass_at": {str(k): _estimate(passed) for k, passed in result.pass_at.items()},
            "majority_at": {str(k): _estimate(vote) for k, vote in result.majority_at.items()},
        }
    first = [vars(failure) for failure in result.failures[:FAILURES_KEPT]]
    return values | {"failures": failure_kinds(result.failures), "first_failures": first}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    interval = [estimate.low, estimate.high]
    return {"value": estimate.value, "interval_95": interval, "problems": estimate.problems}
