"""The names that metrics had in version 0.2. Every reader of a run finds its old lines under the names of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# <name> stands for the name of a reward or of a source of data.
OLD_METRICS = {
    "group/tied": "group/zero_variance",
    "group/refilled": "group/resampled",
    "source/<name>/tied": "source/<name>/zero_variance",
    "completion/clipped": "completion/truncated",
    "eval/completion_clipped": "eval/completion_truncated",
    "eval/without_mark": "eval/unscored",
    "policy/step_kl": "policy/approx_kl",
    "loss/own": "loss/custom",
    "alarm/right/<name>": "alarm/correct/<name>",
    "agent/segments_mean": "agent/branches_mean",
    "forks/rows": "branches/rows",
    "forks/tokens": "branches/tokens",
    "corpus/taught_tokens": "corpus/trained_tokens",
    "speed/taught_tokens_per_second": "speed/trained_tokens_per_second",
    "draft/head_age": "draft/mtp_head_age",
    "time/draft_head": "time/mtp_head",
    "publish/bytes": "sync/bytes",
    "canary/logprob_abs_mean": "sync_check/logprob_abs_mean",
    "canary/logprob_abs_max": "sync_check/logprob_abs_max",
    "canary/repeats": "sync_check/repeats",
    "time/publish": "time/sync",
    "time/canaries": "time/sync_check",
    "time/confirm": "time/sync_transfer",
}
OF_A_NAME = [tuple(old.split("<name>")) for old in OLD_METRICS if "<name>" in old]


def new_metric(name: str) -> str:
    """The name of today for a metric of 0.2; any other name as it is.

    >>> new_metric("group/tied"), new_metric("alarm/right/gsm8k"), new_metric("reward/mean")
    ('group/zero_variance', 'alarm/correct/gsm8k', 'reward/mean')
    """
    if name in OLD_METRICS:
        return OLD_METRICS[name]
    for start, end in OF_A_NAME:
        label = name.removeprefix(start).removesuffix(end)
        if label and name == f"{start}{label}{end}":
            return OLD_METRICS[f"{start}<name>{end}"].replace("<name>", label)
    return name


def with_new_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a row under the names of today. A metric that has both names keeps the value of the new one.

    >>> with_new_names({"step": 1, "policy/step_kl": 0.5})
    {'step': 1, 'policy/approx_kl': 0.5}
    """
    renamed = dict(row)
    for name in row:
        new = new_metric(name)
        if new != name:
            renamed.setdefault(new, row[name])
            del renamed[name]
    return renamed
