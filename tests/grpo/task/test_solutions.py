"""`data.solutions` and `data.validation`: which problems supervised steps, GRPO and choices may see."""

from types import SimpleNamespace

import pytest

from grpo.config.run import SftConfig, TrainConfig
from grpo.task.check import task_of as task_with
from grpo.task.task import Task
from policies.presets import small_tokenizer

WORDS = {"name": "word_problems", "task_options": {"levels": [1]}, "limit": 60}
SHORT = {"model": "tiny", "rewards": [{"function": "gsm8k"}], "prompts_per_step": 4}


def task_of(tmp_path, kind=TrainConfig, **data):
    config = kind.model_validate(SHORT | {"output_dir": tmp_path / "run", "data": WORDS | data})
    return Task.of(config)


def ids(examples):
    return [example.example_id for example in examples]


def test_supervised_steps_take_the_solved_problems_and_grpo_the_others(tmp_path):
    with task_of(tmp_path, solutions=20) as task:
        everything = ids(task.train)
        assert ids(task.solved) == everything[:20]
        assert ids(task.unsolved) == everything[20:]
        assert set(ids(task.stream(0).take_examples(40))) == set(everything[20:])
        texts = list(task.corpus())  # of a preset's tokenizer
        assert [("####" in text) for text in texts] == [True] * 20 + [False] * 40
    with task_of(tmp_path) as task:
        assert ids(task.solved) == ids(task.unsolved) == ids(task.train)
        assert task.validation == []


def test_validation_problems_are_the_last_ones_and_never_trained_on(tmp_path):
    with task_of(tmp_path) as whole, task_of(tmp_path, validation=10, solutions=20) as task:
        assert set(ids(task.validation)) <= set(ids(whole.train)[-10:])
        assert ids(task.train) == ids(whole.train)[:-10]
        learned_from = task.fingerprints(task.train).keys()
        assert task.validation
        assert not learned_from & task.fingerprints(task.validation).keys()
        assert not learned_from & task.fingerprints(task.held_out).keys()


def test_a_problem_that_is_there_twice_is_not_kept_for_validation(tmp_path):
    rows = [f'{{"question": "{a} + 1?", "answer": "#### {a + 1}"}}' for a in (1, 2, 3, 4, 5, 6, 7, 1)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    with task_of(tmp_path, name=str(tmp_path / "data.jsonl"), task_options={}, validation=2) as task:
        assert [example.question for example in task.validation] == ["7 + 1?"]


def _write(folder, name, numbers):
    lines = [f'{{"question": "{a} + 1?", "answer": "#### {a + 1}"}}' for a in numbers]
    (folder / name).write_text("\n".join(lines))


def test_contract_16_no_choice_is_made_by_held_out_problems_or_by_problems_that_prompts_show(tmp_path):
    """The best point would be the one that answers the held-out problems best, by chance too."""
    _write(tmp_path, "train.jsonl", (9, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    _write(tmp_path, "test.jsonl", (8, 20))
    given = {"name": str(tmp_path), "task_options": {}, "validation": 3, "few_shot": 1}
    config = TrainConfig.model_validate(SHORT | {"output_dir": tmp_path / "run", "data": WORDS | given})
    with Task.of(config.model_copy(update={"eval": config.eval.model_copy(update={"limit": 2})})) as task:
        assert [example.question for example in task.validation] == ["7 + 1?"]


def test_contract_16_nor_by_those_of_another_source(tmp_path):
    for name, numbers in (("one", (1, 2, 3, 4, 5, 6)), ("two", (11, 12, 13, 14, 6, 7))):
        (tmp_path / name).mkdir()
        _write(tmp_path / name, "train.jsonl", numbers)
        _write(tmp_path / name, "test.jsonl", [30 + numbers[0]])
    _write(tmp_path / "two", "test.jsonl", [5])
    sources = [{"name": str(tmp_path / "one"), "validation": 3}, {"name": str(tmp_path / "two")}]
    config = TrainConfig.model_validate(
        SHORT | {"output_dir": tmp_path / "run", "data": sources, "eval": {"limit": 1}, "prompts_per_step": 2}
    )
    with task_with(config) as task:
        assert [example.question for example in task.validation] == ["4 + 1?"]


def test_a_validation_problem_that_leaves_no_room_is_refused_before_it_is_sampled(tmp_path):
    rows = [f'{{"question": "{a} + 1?{" x" * 300 * (a == 7)}", "answer": "#### {a + 1}"}}' for a in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    with task_of(tmp_path, name=str(tmp_path / "data.jsonl"), task_options={}, validation=1) as task:
        policy = SimpleNamespace(max_length=256, tokenizer=small_tokenizer(["0 1 2 x + ?"], 300))
        with pytest.raises(ValueError, match=r"1 prompts, the first of them '.*/7' with \d+ tokens, pass the policy's"):
            task.check_lengths(policy, 8)


def test_too_few_problems_are_refused(tmp_path):
    for kind, data, message in (
        (TrainConfig, {"validation": 60}, "data.validation=60 keeps all of the 60 training examples"),
        (TrainConfig, {"solutions": 58}, "prompts_per_step=4, but there are 2 training examples"),
        (SftConfig, {"solutions": 2}, "prompts_per_step=4, but there are 2 training examples"),
    ):
        with pytest.raises(ValueError, match=message):
            task_of(tmp_path, kind, **data)
