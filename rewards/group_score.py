"""The score of a group: its rewards, their parts, and the failures with the policy that handles them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from rewards.protocol import RewardError, did_you_mean

ACTIONS = ("abort", "drop_sample", "drop_group", "score")
# The largest reward, alone and times its weight. A standard deviation needs the sum of squares of all scores of a step,
# and the value function computes in fp32. Up to 1e15 both stay finite: a square is 1e30, and fp32 reaches 3e38.
LARGEST = 1e15


def mean(values: Iterable[float]) -> float:
    """The mean, even if the sum overflows; NaN if both infinities are among the values."""
    values = list(values)
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):
        return sum(value / len(values) for value in values)


@dataclass(frozen=True)
class FailurePolicy:
    """The handling of failures, read from `reward.on_error`.

    >>> FailurePolicy.parse("score=-1")
    FailurePolicy(action='score', substitute=-1.0)
    """

    action: str
    substitute: float = 0.0

    @classmethod
    def parse(cls, on_error: str) -> FailurePolicy:
        """Raises RewardError for anything but `abort`, `drop_sample`, `drop_group` and `score=<number>`."""
        action, equals, number = on_error.partition("=")
        if action in ACTIONS and bool(equals) == (action == "score"):
            try:
                substitute = float(number or 0.0)
            except ValueError:
                substitute = math.nan
            if abs(substitute) <= LARGEST and (number or not equals):
                return cls(action, substitute)
        hint = "" if action in ACTIONS else did_you_mean(action, ACTIONS)
        raise RewardError(
            f"reward.on_error={on_error!r} is no policy{hint}. "
            "Choose abort, drop_sample, drop_group or score=<number>, such as score=0"
        )


@dataclass(frozen=True)
class RewardFailure:
    """One completion for which one function gave no usable number.

    `kind`: raised, timeout, nan, inf, too_large (beyond `LARGEST`, alone or times its weight), wrong_length, died (its
    process ended), or not_a_number.
    """

    function: str
    prompt_id: str
    sample_index: int
    kind: str
    message: str

    def __str__(self) -> str:
        return (
            f"reward {self.function!r} failed on prompt {self.prompt_id!r}, sample {self.sample_index}: "
            f"{self.kind}: {self.message}"
        )


class RewardFailed(RewardError):
    """Scoring ended at a failure, as `on_error: abort` says; `failure` names function, prompt and sample."""

    def __init__(self, message: str, failure: RewardFailure):
        super().__init__(message)
        self.failure = failure


@dataclass
class GroupScore:
    """The result for one prompt's G completions.

    `rewards` [G] are the combined ones, `parts` [G] those of each function without weights, and `extras` [G] the values
    of each logged column. `metrics` are the numbers logged for the batch that the group was in. `dropped`: the failure
    policy removed the whole group.

    >>> GroupScore(rewards=[1.2, None], parts={"gsm8k": [1.0, None], "gsm8k_format": [1.0, None]}).errors
    []
    """

    rewards: list[float | None]
    parts: dict[str, list[float | None]]
    errors: list[RewardFailure] = field(default_factory=list)
    extras: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    dropped: bool = False


class GroupTally:
    """Collects the results of the functions for one group, in any order."""

    def __init__(self, prompt_id: str, size: int, weights: dict[str, float]):
        self.prompt_id, self.size, self.weights = prompt_id, size, weights
        self.parts: dict[str, list[float | None]] = {name: [None] * size for name in weights}
        self.errors: list[RewardFailure] = []
        self.extras: dict[str, list] = {}
        self.metrics: dict[str, list[float]] = {}

    def note(self, function: str, sample: int, value: float | dict[str, str] | None) -> None:
        """A number, None, or a failure as `{"kind": ..., "message": ...}`."""
        if isinstance(value, float):
            value = _fault(value, self.weights[function]) or value
        if isinstance(value, dict):
            self.errors.append(RewardFailure(function, self.prompt_id, sample, value["kind"], value["message"]))
        else:
            self.parts[function][sample] = value

    def note_extra(self, column: str, sample: int, value: object) -> None:
        self.extras.setdefault(column, [None] * self.size)[sample] = value

    def note_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(value)

    def result(self, policy: FailurePolicy) -> GroupScore:
        """Combine by weight and by failure policy (for `abort` the scorer raises)."""
        errors = sorted(self.errors, key=lambda error: error.sample_index)
        left_out = {error.sample_index for error in errors}
        if policy.action == "score":
            left_out = set()
            for error in errors:
                self.parts[error.function][error.sample_index] = policy.substitute
        dropped = bool(errors) and policy.action == "drop_group"
        # One that weighs nothing is only recorded: where all others abstain, its 0 would be a mark that nobody gave.
        weights = {name: weight for name, weight in self.weights.items() if weight} or self.weights
        rewards: list[float | None] = []
        for sample in range(self.size):
            values = [(weight, self.parts[name][sample]) for name, weight in weights.items()]
            terms = [weight * value for weight, value in values if value is not None]
            rewards.append(sum(terms) if terms and not dropped and sample not in left_out else None)
        metrics = {name: mean(values) for name, values in self.metrics.items()}
        return GroupScore(rewards, self.parts, errors, self.extras, metrics, dropped)


def _fault(value: float, weight: float) -> dict[str, str] | None:
    """Says why no advantage can be computed from this value, or None."""
    if not math.isfinite(value):
        return {"kind": "nan" if math.isnan(value) else "inf", "message": f"returned {value}"}
    if max(abs(value), abs(weight * value)) <= LARGEST:
        return None
    weighted = f", times its weight {weight:g}" if abs(value) <= LARGEST else ""
    return {"kind": "too_large", "message": f"returned {value:g}{weighted}: beyond ±{LARGEST:g} scores overflow"}
