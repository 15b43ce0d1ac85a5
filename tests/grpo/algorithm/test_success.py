import json
from math import exp

import pytest

from grpo.algorithm.success import SuccessModel, words_of


def test_before_it_has_learned_every_prompt_is_even():
    assert SuccessModel().predict("3 + 4 = ?") == 0.5


def test_one_step_of_adagrad_by_hand():
    """One word: two passes. First p = 1/2, gradient -1/2, both sums 1.25, so both weights are .5 · .5 / √1.25 = .2236;
    then z = .4472, p = .60998, gradient -.39002, sums 1.25 + .15212 = 1.40212, and .5 · .39002 / √1.40212 = .16469."""
    model = SuccessModel()
    model.learn([("a", 1.0)])
    assert model.weights == {"a": pytest.approx([0.2236 + 0.16469, 1.40212], abs=1e-4)}
    assert model.bias == pytest.approx([0.2236 + 0.16469, 1.40212], abs=1e-4)
    assert model.predict("a") == pytest.approx(1 / (1 + exp(-0.77658)), abs=1e-4)


def test_a_word_moves_by_the_root_of_how_many_there_are():
    """Three features, √3 = 1.732: .2236 / 1.732 = .1291 each, then z = .2236 + 3 · .1291 = .6109, p = .64815, and
    .5 · .35185 / √1.3738 / 1.732 = .0867 each."""
    model = SuccessModel()
    model.learn([("a b", 1.0)])
    assert sorted(model.weights) == ["a", "a b", "b"]
    assert [pair[0] for pair in model.weights.values()] == [pytest.approx(0.1291 + 0.0867, abs=1e-4)] * 3
    assert model.bias[0] == pytest.approx(0.2236 + 0.1501, abs=1e-4)


def test_words_numbers_and_signs_and_their_neighbours():
    assert words_of("Anna has 12 toys, 2.5 each") == [
        *("Anna", "has", "12", "toys", ",", "2", ".", "5", "each"),
        *("Anna has", "has 12", "12 toys", "toys ,", ", 2", "2 .", ". 5", "5 each"),
    ]
    assert words_of("") == []


def test_it_learns_which_prompts_are_solved_and_follows_a_policy_that_changes():
    model = SuccessModel()
    for _ in range(30):
        model.learn([("2 + 3", 1.0), ("4 + 5", 1.0), ("2 * 3", 0.0), ("4 * 5", 0.0)])
    assert model.predict("6 * 7") < 0.25 < 0.75 < model.predict("6 + 7")
    for _ in range(60):
        model.learn([("2 * 3", 1.0), ("4 * 5", 1.0)])
    assert model.predict("6 * 7") > 0.6


def test_contract_9_the_state_goes_through_json():
    whole, first, second = SuccessModel(), SuccessModel(), SuccessModel()
    steps = [[(f"{i} + {j}", (i * j) % 5 / 4) for j in range(4)] for i in range(6)]
    for step in steps:
        whole.learn(step)
    for step in steps[:3]:
        first.learn(step)
    state = json.dumps(first.state_dict())
    first.learn(steps[3])
    second.load_state_dict(json.loads(state))
    for step in steps[3:]:
        second.learn(step)
    assert second.state_dict() == whole.state_dict()
