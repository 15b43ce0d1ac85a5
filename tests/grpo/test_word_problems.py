import re

import pytest

from grpo.word_problem_templates import LEVELS, NAMES, THINGS, Template
from grpo.word_problems import count_problems, heldout_name, word_problems

EVERY_PROBLEM = 10**9
COUNTS = {
    ("train", 1): 7_168,
    ("heldout", 1): 1_024,
    ("train", 2): 86_016,
    ("heldout", 2): 12_288,
    ("train", 3): 161_728,
    ("heldout", 3): 23_104,
    ("train", 4): 6_453_888,
    ("heldout", 4): 921_984,
}


def some_of_every_level(split, count=2_000, seed=0):
    return [problem for level in LEVELS for problem in word_problems(split, [level], seed, count=count)]


def integers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def check_arithmetic(question, answer):
    """Every equation is true and uses numbers at hand; the last result is the answer."""
    *lines, last = answer.split("\n")
    at_hand = integers(question)
    for line in lines:
        left, sign, right, result = re.fullmatch(r"[A-Za-z ]+ (\d+) ([-+*/]) (\d+) = (\d+)[a-z ]+\.", line).groups()
        a, b, c = int(left), int(right), int(result)
        true = {"+": a + b == c, "-": a == b + c, "*": a * b == c, "/": a == b * c}
        assert true[sign], line
        assert {a, b} <= set(at_hand), (question, line)
        at_hand.append(c)
    assert last == f"#### {at_hand[-1]}"
    return len(lines)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right_in_every_step(split):
    steps = {1: 1, 2: 2, 3: 2, 4: 3}
    for problem in some_of_every_level(split):
        assert check_arithmetic(problem["question"], problem["answer"]) == steps[problem["level"]]


def test_every_number_of_a_question_is_used():
    for problem in some_of_every_level("train"):
        operands = [n for pair in re.findall(r"(\d+) [-+*/] (\d+)", problem["answer"]) for n in map(int, pair)]
        assert set(integers(problem["question"])) <= set(operands), problem


# Written by hand from the words of each question, apart from the equations of the templates.
HAND_WORKED = {
    "buys": lambda have, bought: have + bought,
    "gives": lambda have, given: have - given,
    "fills_bags": lambda bags, each: bags * each,
    "shares": lambda have, friends: have // friends,
    "buys_bags": lambda have, bags, each: have + bags * each,
    "gives_each": lambda have, each, friends: have - each * friends,
    "sells_all": lambda have, found, price: (have + found) * price,
    "shares_rest": lambda have, kept, friends: (have - kept) // friends,
    "buys_twice": lambda have, monday, tuesday: have + monday + tuesday,
    "gives_buys": lambda have, given, bought: have - given + bought,
    "loses_gives": lambda have, lost, given: have - lost - given,
    "times_as_many": lambda friend, times, bought: friend * times + bought,
    "shares_bags": lambda bags, each, friends: bags * each // friends,
    "spends": lambda dollars, things, price: dollars - things * price,
    "earns": lambda dollars, things, price: dollars + things * price,
    "adds_to_bags": lambda have, bags, more: have // bags + more,
    "has_fewer": lambda have, fewer: have + (have - fewer),
    "morning_evening": lambda morning, evening, each: (morning + evening) * each,
    "bags_boxes": lambda bags, in_bag, boxes, in_box: bags * in_bag + boxes * in_box,
    "spends_more": lambda dollars, things, price, bag: dollars - things * price - bag,
    "three_days": lambda monday, times, wednesday: monday + monday * times + wednesday,
    "sells_together": lambda have, more, price: (have + have + more) * price,
    "keeps_gives_shares": lambda have, kept, given, friends: (have - kept - given) // friends,
    "fills_keeps": lambda first, more, bags, left: (first + more) * bags + left,
}


def test_each_template_answers_what_its_words_ask():
    seen = set()
    for problem in some_of_every_level("train", count=400):
        template = problem["id"].split("/")[2]
        expected = HAND_WORKED[template](*integers(problem["question"]))
        assert problem["answer"].endswith(f"\n#### {expected}"), problem
        seen.add(template)
    assert seen == set(HAND_WORKED)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_numbers_are_at_least_two_so_that_plurals_are_right(split):
    for problem in some_of_every_level(split):
        assert min(integers(problem["question"] + problem["answer"])) >= 2, problem
        assert not re.search(r"[{}]|  ", problem["question"] + problem["answer"])
        assert re.fullmatch(r"([A-Z][\w ,]+\. )+How many [\w ]+\?", problem["question"])


def test_pronouns_follow_the_name():
    women = {"Anna", "Clara", "Emma", "Grace"}
    for problem in some_of_every_level("train", count=400):
        name = re.search("|".join(NAMES), problem["question"]).group()
        wrong = "He" if name in women else "She"
        assert not re.search(rf"\b{wrong}\b", problem["question"]), problem


@pytest.mark.parametrize("level", [1, 2])
def test_no_problem_is_in_both_splits_every_problem(level):
    train = {problem["question"] for problem in word_problems("train", [level], 0, count=EVERY_PROBLEM)}
    heldout = {problem["question"] for problem in word_problems("heldout", [level], 7, count=EVERY_PROBLEM)}
    assert (len(train), len(heldout)) == (COUNTS["train", level], COUNTS["heldout", level])
    assert not train & heldout


def test_no_problem_is_in_both_splits_any_level_any_seed():
    train = {p["question"] for seed in range(3) for p in some_of_every_level("train", 6_000, seed)}
    heldout = {p["question"] for seed in range(3) for p in some_of_every_level("heldout", 6_000, seed)}
    assert len(train) > 40_000
    assert len(heldout) > 30_000
    assert not train & heldout


def test_the_held_out_name_is_a_function_of_the_content():
    for problem in some_of_every_level("heldout", count=200):
        _, _, template, content = problem["id"].split("/")
        name, things, *operands = content.split("-")
        assert name == heldout_name(template, things, [int(operand) for operand in operands])
    # pinned: another hash would let a saved policy be tested on problems that it was trained on
    assert [heldout_name("buys", things, [3, 4]) for things in THINGS[:4]] == ["Emma", "Henry", "Henry", "Anna"]


def test_held_out_names_are_spread_evenly():
    names = [problem["id"].split("/")[3].split("-")[0] for problem in word_problems("heldout", [2], count=8_000)]
    assert all(800 < names.count(name) < 1_200 for name in NAMES)


@pytest.mark.parametrize(("split", "level"), COUNTS)
def test_counts_are_as_documented(split, level):
    assert count_problems(split, level) == COUNTS[split, level]


@pytest.mark.parametrize(("level", "quantity", "multiplier"), [(1, 9, 5), (2, 9, 5), (3, 20, 9), (4, 50, 9)])
def test_operands_stay_in_the_documented_ranges(level, quantity, multiplier):
    operands = {template.name: template.operands for template in LEVELS[level].templates}
    quantities, multipliers = set(), set()
    for problem in word_problems("train", [level], count=4_000):
        _, _, template, content = problem["id"].split("/")
        for letter, value in zip(operands[template], content.split("-")[2:], strict=True):
            (multipliers if letter in "mn" else quantities).add(int(value))
    assert quantities == set(range(2, quantity + 1))
    assert multipliers == set(range(2, multiplier + 1))


def test_a_problem_depends_on_split_levels_seed_and_index_alone():
    problems = word_problems("train", [1, 3], seed=5, count=500)
    assert word_problems("train", [1, 3], seed=5, count=60) == problems[:60]
    assert word_problems("train", [1], seed=5, count=250) == problems[::2]
    assert word_problems("train", [1, 3], seed=6, count=500) != problems
    assert len({problem["id"] for problem in problems}) == 500


def test_the_same_problems_on_every_machine():
    assert word_problems("heldout", [4], count=1) == [
        {
            "question": "Frank has 2 bags of 8 cards and 4 boxes of 7 cards. How many cards does Frank have in all?",
            "answer": (
                "The bags hold 2 * 8 = 16 cards.\n"
                "The boxes hold 4 * 7 = 28 cards.\n"
                "In all there are 16 + 28 = 44 cards.\n"
                "#### 44"
            ),
            "level": 4,
            "id": "word_problems/4/bags_boxes/Frank-cards-2-8-4-7",
        }
    ]


def test_levels_and_templates_take_turns():
    problems = word_problems("train", [2, 1], count=48)
    assert [problem["level"] for problem in problems] == [2, 1] * 24
    templates = [problem["id"].split("/")[2] for problem in problems[1::2]]
    assert templates == [template.name for template in LEVELS[1].templates] * 6


def test_an_exhausted_level_ends_the_mixture():
    assert len(word_problems("heldout", [1, 2], count=EVERY_PROBLEM)) == 2 * 1_024


def test_every_step_of_every_template_has_its_equation():
    for level in LEVELS.values():
        for template in level.templates:
            assert len(template.equations) == len(template.given) + len(template.steps), template.name
    assert Template("add", "{a} and {b}?", ("{a} + {b} = {x}",)).operands == ["a", "b"]
    names = [template.name for level in LEVELS.values() for template in level.templates]
    assert len(set(names)) == len(names)  # names enter the split's hash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", [1]), "no split 'test'; use one of train, heldout"),
        (("train", []), r"levels=\[\]"),
        (("train", [1, 5]), r"levels=\[1, 5\]; name each of \[1, 2, 3, 4\] at most once"),
        (("train", [1, 1]), r"levels=\[1, 1\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        word_problems(*arguments)
    with pytest.raises(ValueError, match="cannot make 0 problems"):
        word_problems("train", [1], count=0)
