import re
from itertools import product

import pytest

from rewards.data.word_problem_templates import LEVELS, NAMES, THINGS, Template
from rewards.data.word_problems import is_held_out, shared_with_training, word_problems

EVERY_PROBLEM = 10**9
COUNTS = {("train", 1): 6_912, ("held_out", 1): 1_280, ("train", 2): 85_632, ("held_out", 2): 12_288}


def some_of_every_level(split, count=2_000, seed=0):
    return [problem for level in LEVELS for problem in word_problems(split, [level], seed, count=count)]


def integers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def check_arithmetic(problem):
    """Every equation is true and uses numbers at hand; the last result is the answer. Returns the equations' number."""
    question = problem["question"]
    *lines, last = problem["answer"].split("\n")
    if problem["level"] <= 2:  # what is given comes first
        facts = lines.pop(0)
        assert sorted(integers(facts)) == sorted(integers(question)), (question, facts)
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


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_right_in_every_step_and_sentences_in_every_word(split):
    steps = {1: 1, 2: 2, 3: 2, 4: 3}
    women = {"Anna", "Clara", "Emma", "Grace"}
    for problem in some_of_every_level(split):
        assert check_arithmetic(problem) == steps[problem["level"]]
        operands = [n for pair in re.findall(r"(\d+) [-+*/] (\d+)", problem["answer"]) for n in map(int, pair)]
        assert set(integers(problem["question"])) <= set(operands), problem  # every number is used
        assert min(integers(problem["question"] + problem["answer"])) >= 2, problem  # so that plurals are right
        assert not re.search(r"[{}]|  ", problem["question"] + problem["answer"])
        assert re.fullmatch(r"([A-Z][\w ,]+\. )+How many [\w ]+\?", problem["question"])
        name = re.search("|".join(NAMES), problem["question"]).group()
        assert not re.search(r"\bHe\b" if name in women else r"\bShe\b", problem["question"]), problem
    questions = [problem["question"] for problem in word_problems(split, [2], count=8_000)]
    for word in (*NAMES, *THINGS):  # they take part in both splits
        assert 700 < sum(word in question for question in questions) < 1_800, word


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


def content(problem):
    """Template and numbers without name and things: what is left when a problem is told of somebody else."""
    return problem["id"].split("/")[2], *integers(problem["question"])


@pytest.mark.parametrize("level", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_contract_16_held_out_means_unseen_under_every_name_every_problem(level):
    """The numbers of a held-out problem are in no training problem of any template, name, thing, seed and order."""
    train = word_problems("train", [level], 0, count=EVERY_PROBLEM)
    held_out = word_problems("held_out", [level], 7, count=EVERY_PROBLEM)
    assert (len(train), len(held_out)) == (COUNTS["train", level], COUNTS["held_out", level])
    assert not {problem["question"] for problem in train} & {problem["question"] for problem in held_out}
    assert not {content(problem) for problem in train} & {content(problem) for problem in held_out}
    met = {tuple(sorted(integers(problem["question"]))) for problem in train}
    assert not met & {tuple(sorted(integers(problem["question"]))) for problem in held_out}


@pytest.mark.slow
def test_contract_16_held_out_means_unseen_under_every_name_any_level_any_seed():
    train = [p for seed in range(3) for p in some_of_every_level("train", 6_000, seed)]
    held_out = [p for seed in range(3) for p in some_of_every_level("held_out", 1_000, seed)]
    met = {tuple(sorted(integers(problem["question"]))) for problem in train}
    unmet = {tuple(sorted(integers(problem["question"]))) for problem in held_out}
    assert len(met) > 10_000
    assert len(unmet) > 1_000
    assert not met & unmet


def test_what_is_shared_with_training_is_counted():
    train, held_out = (word_problems(split, [1, 2], count=600) for split in ("train", "held_out"))
    ids = [[problem["id"] for problem in problems] for problems in (train, held_out)]
    assert shared_with_training(*ids) == (600, 0)
    mixed = held_out + train[:7]
    met = {tuple(sorted(integers(problem["question"]))) for problem in mixed}
    shared = sum(tuple(sorted(integers(problem["question"]))) in met for problem in train)
    assert shared_with_training([problem["id"] for problem in mixed], ids[0]) == (600, shared)
    assert shared > 7


def test_the_numbers_alone_decide_what_is_held_out():
    # pinned: another hash would let a saved policy be tested on problems that it was trained on
    pairs = [(a, b) for a in range(2, 10) for b in range(a, 10)]
    assert [pair for pair in pairs if is_held_out(pair)] == [(2, 4), (2, 6), (3, 8), (4, 7), (9, 9)]
    assert all(is_held_out((b, a)) == is_held_out((a, b)) for a, b in pairs)


def test_about_one_problem_in_eight_of_every_template_is_held_out():
    for level in (1, 2):
        for template in LEVELS[level].templates:
            numbers = map(template.numbers, product(*LEVELS[level].operand_ranges(template)))
            held = [is_held_out(known[letter] for letter in template.asked) for known in numbers]
            assert 0.12 < sum(held) / len(held) < 0.16, template.name


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
    problems = word_problems("train", [2, 1], count=48)  # levels and templates take turns
    assert [problem["level"] for problem in problems] == [2, 1] * 24
    templates = [problem["id"].split("/")[2] for problem in problems[1::2]]
    assert templates == [template.name for template in LEVELS[1].templates] * 6
    assert len(word_problems("held_out", [1, 2], count=EVERY_PROBLEM)) == 2 * 1_280  # until one level has no more


def test_the_same_problems_on_every_machine():
    assert word_problems("held_out", [4], count=1) == [
        {
            "question": "Ben has 4 bags of 25 apples and 8 boxes of 22 apples. How many apples does Ben have in all?",
            "answer": (
                "The bags hold 4 * 25 = 100 apples.\n"
                "The boxes hold 8 * 22 = 176 apples.\n"
                "In all there are 100 + 176 = 276 apples.\n"
                "#### 276"
            ),
            "level": 4,
            "id": "word_problems/4/bags_boxes/Ben-apples-4-25-8-22",
        }
    ]


def test_every_step_of_every_template_has_its_equation():
    for number, level in LEVELS.items():
        for template in level.templates:
            facts = 1 if number <= 2 else 0
            assert len(template.equations) == len(template.given) + len(template.steps) - facts, template.name
    assert Template("add", "{a} and {b}?", ("{a} + {b} = {x}",)).operands == ["a", "b"]
    names = [template.name for level in LEVELS.values() for template in level.templates]
    assert len(set(names)) == len(names)  # names enter the split's hash


def test_bad_arguments_are_named():
    for arguments, message in (
        (("test", [1]), "no split 'test'; use one of train, held_out"),
        (("train", []), r"levels=\[\]"),
        (("train", [1, 5]), r"levels=\[1, 5\]; name each of \[1, 2, 3, 4\] at most once"),
        (("train", [1, 1]), r"levels=\[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            word_problems(*arguments)
    with pytest.raises(ValueError, match="cannot make 0 problems"):
        word_problems("train", [1], count=0)
