"""What a run has learned, in a sentence."""

import pytest

from grpo.view.headline import difference_interval, headline


def test_the_interval_is_newcombes():
    """His example (1998, table II a): 48 of 80 against 56 of 70, method 10."""
    low, high = difference_interval(48 / 80, 56 / 70, (80, 70))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def _evaluations(first: float, last: float, name: str = "eval/accuracy") -> list[dict]:
    ends = [{"step": step, name: value, "eval/prompts": 512} for step, value in ((0, first), (60, last))]
    return [ends[0], {"step": 30, "reward/mean": 0.5}, ends[1]]


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [
        (0.637, 0.734, "The difference is +0.097 (95 %: +0.040 to +0.153), so it has learned."),
        (0.734, 0.637, "The difference is -0.097 (95 %: -0.153 to -0.040), so it has become worse."),
        (0.182, 0.184, "The difference is +0.002 (95 %: -0.045 to +0.049), which may be chance."),
    ],
)
def test_the_verdict_follows_from_the_interval(first, last, verdict):
    [sentence] = headline(_evaluations(first, last))
    assert sentence.startswith(f"Held out, sampled: accuracy {first} at step 0, {last} at step 60, on 512 problems. ")
    assert sentence.endswith(verdict)


def test_sampled_and_greedy_have_a_sentence_each():
    rows = [row | {"eval/accuracy_greedy": 0.5} for row in _evaluations(0.4, 0.6)]
    assert [sentence[:18] for sentence in headline(rows)] == ["Held out, sampled:", "Held out, greedy: "]


def test_a_mean_reward_has_no_interval():
    [sentence] = headline(_evaluations(-0.5, 3.0, "eval/reward_mean"))
    assert "mean reward -0.500 at step 0, 3.000 at step 60" in sentence
    assert "+3.500; it has no interval" in sentence


def test_completions_without_a_mark_leave_no_interval_and_no_verdict():
    """Nobody knows then over how many problems the accuracy is a mean."""
    for end in (0, 2):
        rows = _evaluations(0.2, 0.6)
        rows[end]["eval/without_mark"] = 460
        [sentence] = headline(rows)
        assert sentence.endswith("The difference is +0.400; it has no interval, since some completions have no mark.")


def test_a_run_that_has_just_begun_promises_nothing():
    assert headline([]) == []
    [sentence] = headline(_evaluations(0.4, 0.6)[:2])
    assert sentence.endswith("accuracy 0.400 at step 0, on 512 problems. There is no later evaluation yet.")


def test_without_evaluations_training_is_all_there_is():
    rows = [{"step": step, "reward/mean": step / 100} for step in range(1, 41)]
    assert headline(rows) == [
        "In training: mean reward 0.055 in the first 10 steps, 0.355 in the last. Nothing was held out."
    ]
