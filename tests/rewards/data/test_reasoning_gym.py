"""Tasks of reasoning-gym by name: the same problems every time, disjoint splits, their own scorers."""

import json
import sys
from importlib.util import find_spec

import pytest

from grpo.task.task import Task
from rewards import RewardError, RewardSpec, Scorer, load_reward
from rewards.config.data import ProblemOptions, SourceOptions
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.data.examples import load_examples
from rewards.data.reasoning_gym import reasoning_gym_problems

pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="needs the extra reasoning-gym")
reasoning_gym = load_reward("reasoning_gym")

LEGS = "reasoning_gym:leg_counting"


def test_a_task_is_a_dataset():
    examples = load_examples(LEGS, "train", ProblemOptions(task_options={"max_animals": 4}), limit=5)
    assert len(examples) == 5
    assert all("how many legs" in example.question for example in examples)
    assert [example.solution for example in examples] == [example.columns["answer"] for example in examples]
    assert examples[0].columns["metadata"]["source_dataset"] == "leg_counting"
    assert all(len(example.columns["metadata"]["animals"]) <= 4 for example in examples)
    assert examples[0].example_id == "reasoning_gym/leg_counting/0/0"
    assert load_examples(LEGS, "train", ProblemOptions(task_options={"max_animals": 4}), limit=2) == examples[:2]


def test_the_documented_example():
    [problem] = reasoning_gym_problems("leg_counting", "train", count=1)
    assert (problem["question"][-32:], problem["answer"]) == ("mantiss, 9 crabs, 3 woodlouses?\n", "500")
    columns = {name: [problem[name]] for name in ("question", "answer", "metadata")}
    close = reasoning_gym(None, ["<answer>500 legs</answer>"], **columns)
    assert close == [3 / 8]  # the share of the answer that is right: 3 of 8 characters


def test_no_question_is_in_both_splits_whatever_the_seeds():
    train = {p["question"] for seed in (0, 1, 7) for p in reasoning_gym_problems("gcd", "train", seed, count=300)}
    held_out = {p["question"] for seed in (0, 1, 9) for p in reasoning_gym_problems("gcd", "held_out", seed, count=100)}
    assert len(train) >= 300
    assert len(held_out) >= 100
    assert not train & held_out
    problems = reasoning_gym_problems("coin_flip", "train", count=50, options={"min_trials": 2, "max_trials": 3})
    questions = [problem["question"] for problem in problems]  # they end where the task repeats itself
    assert len(set(questions)) == len(questions) > 0
    with pytest.raises(ValueError, match=r"'held_out' of reasoning_gym:leg_counting is for evaluation"):
        load_examples(LEGS, "held_out")
    data = SourceOptions(name=LEGS, limit=6)
    with Task(data, [RewardOptions(function="reasoning_gym")], ScoringOptions(), held_out=4) as task:
        assert (len(task.train), len(task.held_out), task.max_score) == (6, 4, 1.0)
        assert not {e.question for e in task.train} & {e.question for e in task.held_out}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reasoning_gym:leg_count", {}, "did you mean reasoning_gym:leg_counting"),
        ("reasoning_gym:", {}, "tasks are ab, "),
        (LEGS, {"max_animal": 3}, r"data.task_options=.*its options are min_animals, max_animals"),
        (LEGS, {"min_animals": 0}, "min_animals must be positive"),
        ("reasoning_gym:graph_color", {}, "no reference answers, only a scorer: set data.solution_column to null"),
        ("reasoning_gym:arc_agi", {}, "does not give its own gold answer full marks"),
        (
            "reasoning_gym:game_of_life_halting",
            {},
            r"gives full marks to a text that answers nothing \('I do not know.'\)",
        ),
        ("gsm8k", {"max_animals": 3}, "task_options=.* are for word_problems and reasoning_gym tasks; gsm8k has none"),
    ],
)
def test_what_cannot_be_had_is_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_examples(name, "train", ProblemOptions(task_options=options), limit=1)


def test_a_task_without_reference_answers_is_scored():
    options = ProblemOptions(solution_column=None)
    [example] = load_examples("reasoning_gym:graph_color", "train", options, limit=1)
    assert (example.solution, example.columns["answer"]) == ("", None)
    graph = example.columns["metadata"]
    coloring = json.dumps(graph["possible_answer"])
    first, second = graph["puzzle"]["edges"][0]
    clash = json.dumps(graph["possible_answer"] | {str(second): graph["possible_answer"][str(first)]})
    columns = {name: [example.columns[name]] * 3 for name in ("question", "answer", "metadata")}
    marks = reasoning_gym(None, [f"<answer>{coloring}</answer>", clash, "[1, 2"], **columns)
    assert marks == [1.0, 0.01, 0.0]


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'quartet-rewards\[reasoning-gym\]'"):
        load_examples(LEGS, "train", limit=1)


@pytest.mark.parametrize("task", ["leg_counting", "gcd", "word_sorting", "sudoku", "calendar_arithmetic"])
def test_gold_scores_max_score_by_the_tasks_own_scorer_and_other_answers_do_not(task):
    for row in reasoning_gym_problems(task, "train", count=3):
        gold = row["answer"]
        texts = [gold, f"<answer>{gold}</answer>", f"so\n#### {gold}", "no idea"]
        columns = {name: [row[name]] * 4 for name in ("question", "answer", "metadata")}
        scores = reasoning_gym(None, texts, **columns)
        assert scores[:3] == [1.0, 1.0, 1.0]
        assert scores[3] < 0.5


def test_a_completion_that_the_scorer_raises_on_gets_nothing_and_is_counted_and_a_broken_row_raises():
    """prime_factorization's scorer raises on any non-number: that must not end a training under `abort`."""
    [row] = reasoning_gym_problems("prime_factorization", "train", count=1)
    columns = {name: row[name] for name in ("question", "answer", "metadata")}
    texts = [row["answer"], "I do not know.", "2 × x", ""]
    logged = {}
    each = {name: [value] * 4 for name, value in columns.items()}
    marks = reasoning_gym(None, texts, **each, log_metric=logged.__setitem__)
    assert (marks[:3], marks[3] < 0.5) == ([1.0, 0.0, 0.0], True)
    assert logged == {"reasoning_gym/unreadable": 0.5}
    with Scorer([RewardSpec("reasoning_gym")]) as scorer:
        [score] = scorer.score([row["question"]], [texts], [columns], prompt_ids=["a"])
    assert (score.rewards, score.errors) == (marks, [])
    assert score.metrics == {"reasoning_gym/unreadable": 0.5}
    broken = {"question": [row["question"]], "answer": ["two"], "metadata": [row["metadata"]]}
    for text in ("2 × 3", "junk"):
        with pytest.raises(ValueError, match="'two'"):
            reasoning_gym(None, [text], **broken)
    with pytest.raises(KeyError, match="no_such_task"):
        reasoning_gym(None, ["2"], **broken | {"metadata": [{"source_dataset": "no_such_task"}]})


@pytest.mark.parametrize("task", ["countdown", "puzzle24", "n_queens", "simple_integration"])
def test_a_scorer_that_runs_the_completion_as_code_is_refused(task):
    [row] = reasoning_gym_problems(task, "train", count=1)
    columns = {name: [row[name]] for name in ("question", "answer", "metadata")}
    with pytest.raises(RewardError, match=rf"{task} scores a completion by running it as code"):
        reasoning_gym(None, ["print(1)"], **columns)


def test_such_a_task_can_do_with_a_reward_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(completions, metadata, **_):\n"
        "    return [float(c == m['expression']) for c, m in zip(completions, metadata)]\n"
    )
    data = SourceOptions(name="reasoning_gym:countdown", limit=1)
    with pytest.raises(RewardError, match="countdown scores a completion by running it as code"):
        Task(data, [RewardOptions(function="reasoning_gym")], ScoringOptions())  # before a model loads
    with Task(data, [RewardOptions(function=f"{path}:mine")], ScoringOptions()) as task:
        assert task.max_score == 1.0
