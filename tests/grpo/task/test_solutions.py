"""`data.solutions` and `data.validation`: which problems supervised steps, GRPO and choices may see."""

import pytest

from grpo.config.run import SftConfig, TrainConfig
from grpo.task.task import Task

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


def test_too_few_problems_are_refused(tmp_path):
    for kind, data, message in (
        (TrainConfig, {"validation": 60}, "data.validation=60 keeps all of the 60 training examples"),
        (TrainConfig, {"solutions": 58}, "prompts_per_step=4, but there are 2 training examples"),
        (SftConfig, {"solutions": 2}, "prompts_per_step=4, but there are 2 training examples"),
    ):
        with pytest.raises(ValueError, match=message):
            task_of(tmp_path, kind, **data)
