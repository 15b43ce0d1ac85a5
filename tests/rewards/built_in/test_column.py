"""The reward that is there already: a column of the data, or of the run's reward models."""

import pytest

from rewards import RewardError, RewardSpec, Scorer, load_reward
from rewards.group_score import RewardFailed
from rewards.protocol import bind

COLUMN = RewardSpec("column", name="helpful", arguments={"name": "helpful"})


def test_a_column_of_the_data_scores_every_completion_of_its_prompt():
    with Scorer([COLUMN], columns=["helpful"]) as scorer:
        first, second = scorer.score(
            ["p", "q"], [["a", "b"], ["c"]], [{"helpful": 3}, {"helpful": None}], prompt_ids="pq"
        )
    assert first.rewards == [3.0, 3.0]
    assert second.rewards == [None]


def test_a_column_with_a_value_for_every_completion_is_read_one_by_one():
    with Scorer([COLUMN], columns=["helpful"], workers=2) as scorer:
        scores = scorer.score(
            ["p", "q"],
            [["a", "b"], ["c"]],
            [{"answer": "1"}, {"answer": "2"}],
            prompt_ids="pq",
            completion_columns=[{"helpful": [0.5, -2]}, {"helpful": [7.0]}],
        )
    assert [score.parts for score in scores] == [{"helpful": [0.5, -2.0]}, {"helpful": [7.0]}]


def test_contract_6_what_is_no_finite_number_is_a_failure_of_its_own_completion():
    values = [1.0, float("nan"), float("inf"), "4", True, 2.0]
    with Scorer([COLUMN], on_error="drop_sample", columns=["helpful"]) as scorer:
        given = {"prompt_ids": "p", "completion_columns": [{"helpful": values}]}
        [score] = scorer.score(["p"], [["a"] * 6], [{}], **given)
    assert score.rewards == [1.0, None, None, None, None, 2.0]
    assert [(error.sample_index, error.kind) for error in score.errors] == [(i, "raised") for i in range(1, 5)]
    assert all("column 'helpful' holds" in error.message for error in score.errors)


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with (
        Scorer([COLUMN], columns=["answer"]) as scorer,
        pytest.raises(RewardFailed, match="no column 'helpful'.*answer"),
    ):
        scorer.dry_run("p", "c", {"answer": "4"})
    with pytest.raises(RewardError, match="asks for the column 'name'"):
        Scorer([RewardSpec("column")], columns=["answer"])


def test_it_runs_in_trl_too():
    reward = bind(load_reward("column"), {"name": "helpful"})
    assert reward(prompts=["p"] * 2, completions=["a", "b"], helpful=[1, 0.5], trainer_state=object()) == [1.0, 0.5]
