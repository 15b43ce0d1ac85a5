"""GRPO against its controls over several seeds: what `quartet control` has found about each run of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rich import box
from rich.table import Column, Table

from review.readers.control_result import NAMES, WAYS, ControlResult, Measured
from review.statistics.estimates import median_interval

NOTE = (
    "GRPO minus a control: by seed with its paired 95 % interval over the problems; five seeds and more also have "
    "the median over seeds with its interval"
)


@dataclass(frozen=True)
class OverSeeds:
    """A policy of several runs that differ in nothing but the seed. All by seed, for the seeds that have a control."""

    name: str
    results: dict[Any, Measured]
    grpo_minus: dict[Any, Measured]  # none for GRPO itself

    @property
    def values(self) -> list[float]:
        return [result.value for result in self.results.values()]

    @property
    def differences(self) -> list[float]:
        return [difference.value for difference in self.grpo_minus.values()]


Contrasts = dict[str, dict[str, OverSeeds]]  # by way of answering and kind of policy


def contrasts(by_seed: Mapping[Any, ControlResult | None]) -> Contrasts:
    """The controls of a group of runs. Empty if no run of the group has any."""
    controls = {seed: control for seed, control in by_seed.items() if control}
    found: Contrasts = {}
    for way in WAYS:
        policies = {kind: _over_seeds(kind, way, controls) for kind in NAMES}
        if there := {kind: policy for kind, policy in policies.items() if policy.results}:
            found[way] = there
    return found


def _over_seeds(kind: str, way: str, controls: Mapping[Any, ControlResult]) -> OverSeeds:
    policies = {seed: control.policies[kind] for seed, control in controls.items() if kind in control.policies}
    results = {seed: policy.results[way] for seed, policy in policies.items() if way in policy.results}
    differences = {seed: policy.grpo_minus[way] for seed, policy in policies.items() if way in policy.grpo_minus}
    names = [policy.name for policy in policies.values()]
    return OverSeeds(names[0] if names else NAMES[kind], results, differences)


def table(way: str, groups: Mapping[str, Contrasts]) -> Table | None:
    """A row for each policy of each group that answers in this way. None if no group has a control."""
    columns = (
        Column("", no_wrap=True),
        Column("policy", no_wrap=True),
        Column(way, justify="right"),
        Column("GRPO minus it, by seed", justify="right"),
        Column("over seeds", justify="right"),
    )
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns are enough
    for letter, found in groups.items():
        for policy in found.get(way, {}).values():
            by_seed = [f"{seed}: {_difference(difference)}" for seed, difference in policy.grpo_minus.items()]
            value, difference = _center(policy.values, ""), _center(policy.differences, "+")
            table.add_row(letter, policy.name, value, "\n".join(by_seed), difference)
    return table if table.rows else None


def _difference(difference: Measured) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.2f}"
    return f"{difference.value:+.2f} ({difference.low:+.2f}, {difference.high:+.2f})"


def _center(values: Sequence[float], sign: str) -> str:
    """The median over seeds with its interval; the mean of seeds that are too few for one."""
    if not values:
        return ""
    if interval := median_interval(values):
        return f"{median(values):{sign}.3f}\n({interval[0]:{sign}.2f}, {interval[1]:{sign}.2f})"
    return f"{fmean(values):{sign}.3f}"


def as_json(found: Contrasts) -> dict[str, Any]:
    """The same with the values of every seed."""
    return {way: {kind: _content(policy) for kind, policy in of.items()} for way, of in found.items()}


def _content(policy: OverSeeds) -> dict[str, Any]:
    content = {
        "name": policy.name,
        **_over_values(policy.values),
        "by_seed": [_of_seed(seed, result) for seed, result in policy.results.items()],
    }
    if policy.grpo_minus:
        content["grpo_minus"] = {
            **_over_values(policy.differences),
            "by_seed": [_of_seed(seed, difference) for seed, difference in policy.grpo_minus.items()],
        }
    return content


def _over_values(values: Sequence[float]) -> dict[str, Any]:
    return {
        "n": len(values),
        "mean": fmean(values),
        "median": median(values),
        "median_interval": median_interval(values),
    }


def _of_seed(seed: Any, measured: Measured) -> dict[str, Any]:
    interval = None if measured.low is None else (measured.low, measured.high)
    return {"seed": seed, "value": measured.value, "interval_95": interval}
