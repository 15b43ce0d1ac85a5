"""Whether the marks of a run's first reward say right or wrong: only then is there an accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewards.group_score import GroupScore
from rewards.protocol import RightAt
from rewards.ties import tied

ACCURACY, MEAN_REWARD = "eval/accuracy", "eval/reward_mean"


class Verdicts:
    """What a reward declares with `rewards.right_at`, or what its marks show.

    A reward that declares nothing is believed as long as every mark of it is 0 or 1: the first other one ends that for
    good. `max_score`, accuracy or not, is 1, or what a gold solution gets where that is more, unless the reward
    declares another mark.

    >>> verdicts = Verdicts("letters", "undeclared", gold=None)
    >>> verdicts.of(1.0), verdicts.are_given
    (True, True)
    >>> verdicts.see([0.0, 0.5])
    >>> verdicts.of(1.0), verdicts.are_given
    (None, False)
    """

    def __init__(self, reward: str, right_at: RightAt, gold: float | None) -> None:
        self.reward = reward
        self.declared = right_at != "undeclared"
        self.right_at = right_at if isinstance(right_at, float) else 1.0
        self.are_given = right_at is not None
        self.max_score = self.right_at if isinstance(right_at, float) else max(1.0, gold or 0.0)
        self.see([gold])

    def see(self, marks: Iterable[float | None]) -> None:
        if not self.declared and any(mark not in (None, 0, 1) for mark in marks):
            self.are_given = False

    def see_scores(self, scores: Iterable[GroupScore]) -> None:
        """The marks of groups, without the numbers that replace failures (`reward.on_error: score=x`)."""
        for score in scores:
            failed = {error.sample_index for error in score.errors if error.function == self.reward}
            self.see(mark for i, mark in enumerate(score.parts[self.reward]) if i not in failed)

    def of(self, mark: float | None) -> bool | None:
        """Tells whether a completion with this mark is right; None without a mark, and where marks do not say so."""
        return None if mark is None or not self.are_given else reaches(mark, self.right_at)

    @property
    def note(self) -> str | None:
        """Says why there is no accuracy, for a person."""
        if self.are_given:
            return None
        if self.declared:
            return f"no accuracy: the reward {self.reward} declares that its marks do not say right or wrong"
        return (
            f"no accuracy: the reward {self.reward} gives marks other than 0 and 1. If a completion is right from some "
            "mark on, declare it with @rewards.right_at(mark)"
        )


def reaches(mark: float, bar: float) -> bool:
    """A mark that is the bar but for rounding reaches it too, such as ten times 0.1."""
    return mark >= bar or tied([mark, bar])


def judged_problems(line: Mapping[str, Any]) -> float:
    """Gives over how many problems the accuracy of an evaluation is a mean; 0 where some completions have no mark,
    since its record does not say it then.

    >>> judged_problems({"eval/prompts": 10.0}), judged_problems({"eval/prompts": 10.0, "eval/unscored": 3.0})
    (10.0, 0.0)
    """
    return 0.0 if line.get("eval/unscored") else line.get("eval/prompts") or 0.0


def held_out_metric(lines: Sequence[Mapping[str, Any]]) -> str:
    """Gives what the evaluations of a run are compared by: `eval/accuracy` where all that have a mark have it.

    `lines`: `read_metrics`. A reward without a declaration may show at a late step that its marks are no verdicts.

    >>> held_out_metric([{"eval/accuracy": 0.0, "eval/reward_mean": 0.0}, {"eval/reward_mean": 0.3}])
    'eval/reward_mean'
    """
    evaluated = [line for line in lines if line.get(ACCURACY) is not None or line.get(MEAN_REWARD) is not None]
    return ACCURACY if all(line.get(ACCURACY) is not None for line in evaluated) else MEAN_REWARD
