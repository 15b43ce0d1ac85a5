"""From scores to advantages."""

import pytest

from grpo.config.loss import LossOptions
from grpo.learner.prepare import estimate
from rewards.group_score import GroupScore


def test_contract_6_marks_of_a_sample_that_was_dropped_count_in_no_mean():
    """One function failed on the second sample, and the other's mark of it stays in the record. Without it each of the
    two rewards is ±1/√2 after normalisation, their sums ±√2, and those ±1/√2 again."""
    score = GroupScore([2.0, None, 0.0], {"right": [1.0, 1.0, 0.0], "short": [1.0, None, 0.0]})
    loss = LossOptions(multi_objective_aggregation="normalize_then_sum")
    advantages, tied = estimate([score], loss, {"right": 1.0, "short": 1.0})
    assert advantages[0].tolist() == pytest.approx([2**-0.5, 0.0, -(2**-0.5)], abs=1e-3)
    assert tied.tolist() == [False]
