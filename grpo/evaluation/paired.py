"""Two evaluations of the same problems with the same noise."""

from __future__ import annotations

from grpo.evaluation.evaluate import Evaluation
from review.statistics.paired import PairedDifference, paired_difference


def compare(first: Evaluation, second: Evaluation) -> PairedDifference:
    """Over the problems that both have a mark for, by `prompt_id`: by the share that is right where both have an
    accuracy, else by the mean reward."""
    judged = first.interval is not None and second.interval is not None

    def by_id(evaluation: Evaluation) -> dict[str, float]:
        values = evaluation.by_problem if judged else evaluation.rewards_by_problem
        ids = [group.prompt.prompt_id for group in evaluation.groups]
        return {name: value for name, value in zip(ids, values, strict=True) if value is not None}

    a, b = by_id(first), by_id(second)
    both = [name for name in a if name in b]
    return paired_difference([a[name] for name in both], [b[name] for name in both], 1.0 if judged else None)
