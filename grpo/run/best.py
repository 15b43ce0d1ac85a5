"""Which checkpoint of a run is the best, by what its metrics say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from grpo.algorithm.verdicts import held_out_metric


def best_step(lines: Sequence[Mapping[str, Any]], saved: Collection[int], window: int | None = None) -> int | None:
    """The step of `saved` that did best on held-out problems, the latest of equals; None where none was evaluated.

    By eval/accuracy, or by eval/reward_mean where the reward's marks do not say right or wrong. With a `window`: by
    reward/mean, on average over so many steps up to it. `lines`: `read_metrics`.

    >>> best_step([{"step": 1, "eval/accuracy": 0.5}, {"step": 2, "eval/accuracy": 0.4}], saved=[1, 2])
    1
    """
    name = held_out_metric(lines) if window is None else "reward/mean"
    known = {line["step"]: line[name] for line in lines if line.get(name) is not None}
    values = {}
    for step in saved:
        near = [known[s] for s in range(step - (window or 1) + 1, step + 1) if s in known]
        if near:
            values[step] = fmean(near)
    return max(values, key=lambda step: (values[step], step), default=None)
