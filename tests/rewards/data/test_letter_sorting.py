import pytest

from rewards.data.examples import load_examples
from rewards.data.letter_sorting import LETTERS, letter_sorting
from rewards.registry import load_reward


def letters_of(problem):
    return problem["question"].removeprefix("Sort these letters: ").split()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_the_letters_in_order(split):
    for problem in letter_sorting(split, count=2_000):
        letters = letters_of(problem)
        assert 4 <= len(letters) <= 8
        assert set(letters) <= set(LETTERS)
        assert problem["answer"] == "#### " + " ".join(sorted(letters))
        assert problem["id"] == f"letter_sorting/{''.join(letters)}"


def test_contract_16_held_out_means_unseen_in_any_order():
    train, held_out = letter_sorting("train", 0), letter_sorting("held_out", 7, count=2_000)
    sets = [{frozenset(letters_of(problem)) for problem in problems} for problems in (train, held_out)]
    assert not sets[0] & sets[1]
    assert [len(each) for each in sets] == [20_000, 2_000]  # each set of letters once


def test_about_one_set_in_eight_is_held_out():
    train, held_out = letter_sorting("train", count=50_000), letter_sorting("held_out", count=7_000)
    of_four = [[p for p in problems if len(letters_of(p)) == 4] for problems in (train, held_out)]
    assert len(of_four[0]) <= 4_845 * 0.9
    assert len(of_four[1]) <= 4_845 * 0.15


def test_a_problem_depends_on_split_seed_and_index_alone():
    problems = letter_sorting("train", seed=5, count=500)
    assert letter_sorting("train", seed=5, count=60) == problems[:60]
    assert letter_sorting("train", seed=6, count=60) != problems[:60]
    assert letter_sorting("train", count=1)[0]["id"] == "letter_sorting/tkcp"


def test_it_is_a_data_set_by_name():
    examples = load_examples("letter_sorting", "held_out", purpose="eval", limit=3)
    assert [example.solution[:4] for example in examples] == ["####"] * 3
    for split, count, message in (("test", 1, "no split 'test'"), ("train", 0, "make 0"), ("train", 10**9, "1 to")):
        with pytest.raises(ValueError, match=message):
            letter_sorting(split, count=count)


def test_the_reward_of_the_demo_checks_the_question_alone():
    in_order = load_reward("examples/01_demo.py:in_order")
    right = ["#### a b c", "it is #### a b c ", "a b c"]  # the whole completion counts where there is no mark
    wrong = ["#### a b c c", "#### c b a", "#### a b", "#### a b c d", "#### abc", ""]
    for mark, texts in ((1.0, right), (0.0, wrong)):
        for text in texts:
            assert in_order([""], [text], question=["Sort these letters: b c a"]) == [mark], text
