"""No loader trains on the test set of GSM8K, however it is spelt, linked, copied or cut."""

import json
import shutil

import datasets
import pytest
from data_files import write_rows

from grpo.task.task import Task
from rewards.config.data import ProblemOptions, SourceOptions
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.data.examples import load_examples
from rewards.data.leakage import fingerprint, is_gsm8k_test_question

EGGS = (  # the first question of the test set, as published with GSM8K (Cobbe et al. 2021, MIT licence)
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. How much in "
    "dollars does she make every day at the farmers' market?"
)
REFUSED = "must not be trained on"


@pytest.fixture
def copy(gsm8k_folder, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in ("train", "test"):
        shutil.copy(gsm8k_folder / f"{split}.jsonl", folder)
        (folder / f"{split}.jsonl").chmod(0o600)
    return folder


def test_the_fingerprints_are_those_of_the_test_file(gsm8k_folder):
    questions = {
        split: [json.loads(line)["question"] for line in (gsm8k_folder / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }
    assert len(questions["test"]) == 1_319
    assert all(is_gsm8k_test_question([question]) for question in questions["test"])
    assert not any(is_gsm8k_test_question([question]) for question in questions["train"])
    assert len({fingerprint(question) for question in questions["test"]}) == 1_319


@pytest.mark.parametrize(
    "text", [EGGS, EGGS.upper(), EGGS.replace(" ", "\n"), EGGS.replace("’", "'"), EGGS.replace("$", "").rstrip("?")]
)
def test_case_blanks_and_punctuation_do_not_hide_a_question(text):
    assert is_gsm8k_test_question([1, None, text])
    assert not is_gsm8k_test_question([text + " now", text.replace("16", "17"), 16, None, ["list"]])


HELD_OUT = """test TEST gsm8k_test gsm8k-test test_1 test-00000-of-00001 gsm8k.test held_out my_held_out_2
test_questions heldout my_heldout_2"""


def test_a_file_by_its_name(tmp_path):
    for name in [*HELD_OUT.split(), "train", "contest", "latest", "unit_test_writing"]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text('{"question": "1 + 1 = ?", "answer": "#### 2"}\n')
        if name in HELD_OUT.split():
            with pytest.raises(ValueError, match=REFUSED):
                load_examples(file, "train")
        else:  # it only sounds like one
            assert load_examples(file, "train")


def test_the_file_by_every_path_and_link(copy):
    for source in (copy, copy / "test.jsonl", str(copy / "test.jsonl"), copy / ".." / "mine" / "test.jsonl"):
        with pytest.raises(ValueError, match=REFUSED):
            load_examples(source, "test")
        assert load_examples(source, "test", purpose="eval", limit=1)
    assert len(load_examples(copy, "train")) == 7_473
    (copy / "link.jsonl").symlink_to(copy / "test.jsonl")
    (copy / "train.jsonl").unlink()
    (copy / "train.jsonl").hardlink_to(copy / "test.jsonl")
    with pytest.raises(ValueError, match="'test' of .* is for evaluation"):
        load_examples(copy / "link.jsonl", "train")
    with pytest.raises(ValueError, match=r"bad rows \(1319 of 1319\):\nrow 1: a question of GSM8K's test set"):
        load_examples(copy, "train")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_copy_under_another_name_and_in_another_form(copy, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(line) for line in (copy / "test.jsonl").open()][7:12]
    rows = [{"problem": row["question"], "solution": row["answer"]} for row in rows]
    path = write_rows(tmp_path / f"practice.{kind}", rows)
    mapping = {"prompt_column": "problem", "solution_column": "solution"}
    with pytest.raises(ValueError, match=rf"bad rows \(5 of 5\):\nrow 1: .*{REFUSED}"):
        load_examples(path, "train", ProblemOptions(**mapping))
    assert len(load_examples(path, "train", ProblemOptions(**mapping), purpose="eval")) == 5


def test_one_test_question_among_training_rows_is_named(tmp_path, monkeypatch):
    rows = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}", "original": None} for i in range(4)]
    rows[2]["original"] = EGGS  # another column than the prompt's
    path = tmp_path / "mix.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"bad rows \(1 of 4\):\nrow 3: .*{REFUSED}$"):
        load_examples(path, "train")
    rows[2] = {"question": EGGS, "answer": "#### 18", "original": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(ValueError, match=rf"row 3: .*{REFUSED}"):
        load_examples("someone/math", "train")
    assert load_examples("someone/math", "train", limit=1)


@pytest.mark.parametrize("train", [True, False])
def test_neither_training_nor_worked_examples_of_a_task_may_come_from_it(tmp_path, train):
    path = tmp_path / "practice.jsonl"
    path.write_text(json.dumps({"question": EGGS, "answer": "#### 18"}) + "\n")
    data = SourceOptions(name=str(path), few_shot=1)
    with pytest.raises(ValueError, match=REFUSED):
        Task(data, [RewardOptions(function="gsm8k")], ScoringOptions(), train=train)
