"""What an audit finds, and the rollouts as its detectors look at them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite

from rewards.audit.traces import CUT, Trace, groups_of
from rewards.finding import Finding

ANSWERS = ("answer", "gts", "ground_truth", "expected_answer", "solution", "gold", "target", "label")


@dataclass
class Rollouts:
    """The rollouts of a run are audited together. `decode` is that of a tokenizer, where one was given."""

    traces: list[Trace]
    decode: Callable[[list[int]], str] | None = None
    means: dict[str, float] = field(default_factory=dict)  # of the rewards, as files beside the rollouts have them
    own: int | None = None  # how many of the traces these are the means of; None: all
    figures: dict[str, str] = field(default_factory=dict)  # what is told though nothing is wrong with it

    @cached_property
    def trained(self) -> list[Trace]:
        return [trace for trace in self.traces if trace.split == "train"]

    @cached_property
    def groups(self) -> list[list[Trace]]:
        """The groups of the training with two rollouts or more."""
        return [group for group in groups_of(self.trained) if len(group) > 1]

    @cached_property
    def steps(self) -> dict[int, list[Trace]]:
        steps: dict[int, list[Trace]] = {}
        for trace in self.trained:
            if trace.step is not None:
                steps.setdefault(trace.step, []).append(trace)
        return dict(sorted(steps.items()))

    @cached_property
    def high(self) -> list[Trace]:
        """The rollouts whose reward is in the upper quarter of all that there are; none where all have the same."""
        rewards = sorted(trace.value for trace in self.trained if trace.scored)
        rewards = rewards[len(rewards) // 50 : len(rewards) - len(rewards) // 50]  # without a mark for something else
        if not rewards or rewards[0] == rewards[-1]:
            return []
        least = rewards[0] + 0.75 * (rewards[-1] - rewards[0])
        return [trace for trace in self.trained if trace.scored and trace.value >= least]


def is_number(value: float | None) -> bool:
    return value is not None and isfinite(value)


def most_common(values: Iterable) -> tuple:
    """The most common value and its share; None and 0 of no values."""
    counts = Counter(values)
    if not counts:
        return None, 0.0
    value, count = counts.most_common(1)[0]
    return value, count / counts.total()


def answer_of(trace: Trace) -> str | None:
    """The right answer, where a column has it: of a solution as GSM8K writes it, what comes after ####."""
    for name in ANSWERS:
        value = trace.columns.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).split("####")[-1].strip()
    return None


def is_cut(trace: Trace) -> bool:
    return trace.finish_reason in CUT


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def flatten(groups: Iterable[Sequence[Trace]]) -> list[Trace]:
    return [trace for group in groups for trace in group]


Detector = Callable[[Rollouts], Iterator[Finding]]
