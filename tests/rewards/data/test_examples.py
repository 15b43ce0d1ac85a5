import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from data_files import write_jsonl, write_rows

from grpo.task.task import Task
from rewards.config.data import ProblemOptions, SourceOptions
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.data.examples import Example, clean_solution, load_examples

GSM8K = Path(os.environ.get("QUARTET_GSM8K", "nowhere"))
needs_gsm8k = pytest.mark.skipif(not (GSM8K / "train.jsonl").is_file(), reason=f"no GSM8K in {GSM8K}")

ROWS = [{"question": f"{i} + 1 = ?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(4)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "sums"
    path.mkdir()
    write_jsonl(path / "train.jsonl", ROWS)
    write_jsonl(path / "test.jsonl", ROWS[:2])
    return path


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub; its list holds the arguments of every call."""
    calls = []

    def load_dataset(name, config=None, **options):
        calls.append((name, config, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_folder_gives_the_file_of_the_split(folder):
    train = load_examples(folder, "train")
    assert train[2] == Example("sums/train/2", "2 + 1 = ?", "2 + 1 = 3\n#### 3", ROWS[2])
    assert [e.question for e in load_examples(folder, "test", purpose="eval")] == ["0 + 1 = ?", "1 + 1 = ?"]
    assert load_examples(folder / "train.jsonl", "train") == train
    assert load_examples(folder, "train", limit=3) == train[:3]
    for source, split in [(folder, "test"), (folder / "test.jsonl", "train"), (folder / "train.jsonl", "test")]:
        with pytest.raises(ValueError, match=r"'test' of .* is for evaluation"):
            load_examples(source, split)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(folder, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_rows(tmp_path / "sums" / f"train.{kind}", ROWS)
    assert load_examples(path, "train") == load_examples(folder / "train.jsonl", "train")


def test_columns_can_be_mapped_and_all_go_to_the_rewards(tmp_path):
    row = {"problem": "1 + 1 = ?", "solution": "It is <<1+1=2>>2.", "answer": 2, "level": 3}
    path = write_jsonl(tmp_path / "math.jsonl", [row, {**row, "hint": "count"}])
    mapping = {"prompt_column": "problem", "solution_column": "solution"}
    first, second = load_examples(path, "train", ProblemOptions(**mapping))
    assert (first.question, first.solution) == ("1 + 1 = ?", "It is 2.")
    assert first.columns == {**row, "question": "1 + 1 = ?", "hint": None}
    assert second.columns["hint"] == "count"
    numeric = load_examples(path, "train", ProblemOptions(prompt_column="problem", solution_column="answer"))[0]
    assert (numeric.solution, numeric.columns["answer"]) == ("2", "2")


def test_rows_without_a_solution(tmp_path):
    path = write_jsonl(tmp_path / "bare.jsonl", [{"problem": "Say it.", "level": 3}])
    [example] = load_examples(path, "train", ProblemOptions(prompt_column="problem", solution_column=None))
    assert example.solution == ""
    assert example.columns == {"problem": "Say it.", "question": "Say it.", "level": 3}


def test_word_problems_are_examples():
    examples = load_examples("word_problems", "train", limit=50, seed=3)
    assert len(examples) == 50
    assert {example.columns["level"] for example in examples} == {1, 2}
    assert examples[0].solution == examples[0].columns["answer"]
    assert examples[0].example_id == examples[0].columns["id"]
    assert load_examples("word_problems", "held_out", purpose="eval", limit=1)[0].columns["level"] == 1


@pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k"])
def test_gsm8k_comes_from_the_hub_with_the_ids_of_the_local_folder(name, hub):
    assert load_examples(name, "train")[3].example_id == "gsm8k/train/3"
    assert hub == [("openai/gsm8k", "main", {"split": "train"})]


def test_any_hub_id_with_a_configuration(hub):
    assert load_examples("someone/sums:easy", "train[:4]", limit=2)[1].example_id == "sums/train[:4]/1"
    assert load_examples("someone/sums", "train")
    assert [(name, config) for name, config, _ in hub] == [("someone/sums", "easy"), ("someone/sums", None)]


def test_a_failing_hub_is_explained(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"openai/gsm8k, main, train: no route to the hub\n.*or give a file"):
        load_examples("gsm8k", "train")


SPLITS = ("test", "Test", "test[:10]", "TEST[:1]", "train+test[:50%]", "train[:5]+test[-10:]", "train + test[10%:20%]")
NAMES = ("gsm8k", "openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k:socratic", "someone/sums", "word_problems")


@pytest.mark.parametrize("name", NAMES)
def test_never_train_on_test(name, hub):
    for split in (*SPLITS, "train+test", "held_out", "heldout", "all"):
        with pytest.raises(ValueError, match=r"is for evaluation and must not be trained on; .*eval.split"):
            load_examples(name, split)
    assert not hub


def test_bad_rows_are_listed_before_training_ten_and_a_count(tmp_path):
    lines = [json.dumps(ROWS[0]), '{"question": "broken', "[1]", json.dumps({"question": "q"}), ""]
    lines += [json.dumps({"question": " ", "answer": "1"}), json.dumps({"question": "q", "answer": [1]})]
    lines += [json.dumps({"question": "q", "answer": None})] * 9
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        load_examples(path, "train")
    head, *rows = str(error.value).split("\n")
    assert head == f"{path} has bad rows (14 of 15):"
    assert rows[0].startswith("row 2: not JSON (Unterminated string")
    assert rows[1:5] == [
        "row 3: a list instead of an object",
        "row 4: 'answer' is missing",
        "row 6: 'question' is empty",
        "row 7: 'answer' is a list instead of text",
    ]
    assert rows[5:] == [f"row {n}: 'answer' is missing" for n in range(8, 13)] + ["... and 4 more"]


GOOD = {"question": "1 + 1 = ?", "answer": "2"}
BAD_VALUES = [None, "", " \n", ["2"], {"value": 2}, True]
FAULTS = ["missing", "empty", "empty", "a list", "a dict", "a bool"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "hub"])
@pytest.mark.parametrize("column", ["question", "answer"])
def test_every_kind_of_bad_value_is_named_by_row(kind, column, tmp_path, monkeypatch):
    rows = [GOOD, *({**GOOD, column: value} for value in BAD_VALUES), {k: v for k, v in GOOD.items() if k != column}]
    if kind == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
        source = "someone/sums"
    else:
        source = str(write_rows(tmp_path / f"rows.{kind}", rows))
    with pytest.raises(ValueError) as error:
        load_examples(source, "train")
    head, *lines = str(error.value).split("\n")
    assert head == f"{source} has bad rows (7 of 8):"
    for number, (line, fault) in enumerate(zip(lines, [*FAULTS, "missing"], strict=True), start=2):
        assert line.startswith(f"row {number}: {column!r} is {fault}")


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        (["2", None, ""], {2: "missing", 3: "empty"}),
        ([["2"], [], None], {1: "a list", 2: "a list", 3: "missing"}),
        ([2.0, float("nan"), float("inf")], {2: "nan instead of text", 3: "inf instead of text"}),
        ([b"2", b"3", b"4"], {1: "a bytes", 2: "a bytes", 3: "a bytes"}),
    ],
)
def test_bad_values_that_parquet_can_hold(values, faults, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_rows(tmp_path / "rows.parquet", [{**GOOD, "answer": value} for value in values])
    with pytest.raises(ValueError) as error:
        load_examples(path, "train")
    lines = str(error.value).split("\n")[1:]
    assert len(lines) == len(faults)
    for line, (number, fault) in zip(lines, faults.items(), strict=True):
        assert line.startswith(f"row {number}: 'answer' is {fault}")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_missing_column_is_named_in_every_format_with_those_there_are(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_rows(tmp_path / f"rows.{kind}", [GOOD])
    for option in ("solution_column", "prompt_column"):
        with pytest.raises(ValueError, match=f"no column 'other'; its columns are question, answer.*{option}"):
            load_examples(path, "train", ProblemOptions(**{option: "other"}))


OF_CSV = r"\(3 of 4\):\nrow 2: 'question' is empty\nrow 3: 'answer' is empty\nrow 4: 'answer' is missing"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "q", "answer": NaN}\n', r"\(1 of 1\):\nrow 1: 'answer' is nan instead of text"),
        ("a.jsonl", b'\xef\xbb\xbf{"question": "q", "answer": "1"}\n\xe9\n', r"row 2: not JSON .*decode byte 0xe9"),
        ("a.csv", b'question,answer\n1 + 1 = ?,2\n"",2\n1 + 1 = ?," "\n1 + 1 = ?\n', OF_CSV),
        ("a.csv", b'question,answer\n"q,1\nr,2\n', r"a\.csv is not CSV in UTF-8: .* \(after line \d\)"),
        ("a.csv", b"question,answer\ncaf\xe9,1\n", r"a\.csv is not CSV in UTF-8: .* \(after line \d\)"),
        ("a.csv", b"question,answer\n?,2\nHow many, in all?,3\n", r"\(1 of 2\):\nrow 2: fields beyond the header"),
        ("a.csv", b"question,answer,answer\n2 + 3 = ?,5,6\n", "a.csv: the header has the column 'answer' twice"),
        ("a.parquet", b"no parquet", r"could not load the dataset parquet, .*a\.parquet"),
        ("a.json", b'{"question": "q"}', "must hold a JSON list of objects: it holds a dict"),
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.txt", b"?", r"kinds of file that can be are \.jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path / name, "train")


@pytest.mark.parametrize("function", ["gsm8k", "gsm8k_flexible", "gsm8k_boxed", "gsm8k_lm_eval"])
def test_a_gold_answer_that_the_reward_cannot_read_is_a_bad_row(function, tmp_path):
    rows = [*ROWS[:2], {"question": "2 + 1 = ?", "answer": "It is three."}, {"question": "q", "answer": "#### none"}]
    data = SourceOptions(name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(ValueError) as error:
        Task(data, [RewardOptions(function=function)], ScoringOptions())
    head, third, fourth = str(error.value).split("\n")
    assert head.endswith("rows.jsonl has bad rows (2 of 4):")
    assert third.startswith("row 3: the gold answer 'It is three.' has no number")
    assert fourth.startswith("row 4: the gold answer '#### none' has no number")
    for reward in (
        RewardOptions(function="length_penalty", arguments={"target": 5}),
        RewardOptions(function=function, arguments={"answer": ["5"] * 2}),
    ):
        with Task(data, [reward], ScoringOptions()) as task:
            assert len(task.train) == 4


def test_a_line_separator_inside_json_is_not_a_row_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "1"}\n', encoding="utf-8")
    assert load_examples(path, "train")[0].question == "a\u2028b"


def test_missing_files_are_named(tmp_path, folder):
    for missing in [tmp_path / "no.jsonl", "no.jsonl", "./nothing", "data/of/mine"]:
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            load_examples(missing, "train")
    with pytest.raises(FileNotFoundError, match=r"holds none of dev\.jsonl.*; it holds test\.jsonl, train\.jsonl"):
        load_examples(folder, "dev")


def test_arguments_that_cannot_be_meant(hub):
    for name, nearest in {"word_problem": "word_problems", "gms8k": "gsm8k"}.items():
        with pytest.raises(ValueError, match=f"no dataset '{name}'; did you mean '{nearest}'"):
            load_examples(name, "train")
    assert not hub
    for options in ({"levels": 2}, {"level": [2]}):
        with pytest.raises(ValueError, match="word_problems has a list of levels and nothing else"):
            load_examples("word_problems", "train", ProblemOptions(task_options=options))
    with pytest.raises(ValueError, match="limit=0"):
        load_examples("word_problems", "train", limit=0)
    with pytest.raises(ValueError, match="purpose='test'"):
        load_examples("word_problems", "train", purpose="test")


def test_only_calculator_marks_are_stripped():
    assert clean_solution("48/2 = $<<48/2=24>>24, <<(1.5*2)=3>>3") == "48/2 = $24, 3"
    assert clean_solution("std::cout << x >> y << 2") == "std::cout << x >> y << 2"


@needs_gsm8k
def test_gsm8k_loads_whole():
    train = load_examples(GSM8K, "train")
    test = load_examples(GSM8K, "test", purpose="eval")
    assert (len(train), len(test)) == (7_473, 1_319)
    assert train[0].example_id == "gsm8k/train/0"
    assert train[0].solution.startswith("Natalia sold 48/2 = 24 clips in May.\n")
    assert train[0].columns["answer"].startswith("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n")
    assert not any("<<" in example.solution for example in train + test)
    assert not {example.question for example in train} & {example.question for example in test}


@pytest.fixture(autouse=True)
def no_local_copy_of_gsm8k(monkeypatch):
    """`gsm8k` is the hub here, whatever is beside the checkout; the test of the copies has its own."""
    monkeypatch.delenv("QUARTET_GSM8K", raising=False)
    monkeypatch.setattr("rewards.data.examples.GSM8K_COPY", "nowhere")


def test_gsm8k_comes_from_a_local_copy_where_there_is_one(tmp_path, monkeypatch, hub):
    for name in ("work/data/gsm8k", "shared/data/gsm8k", "gsm8k"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.jsonl").write_text(f'{{"question": "{name}?", "answer": "#### 2"}}\n')
    monkeypatch.chdir(tmp_path / "work")

    def question() -> str:
        [example] = load_examples("gsm8k", "train")
        assert example.example_id == "gsm8k/train/0"
        return example.question

    monkeypatch.setattr("rewards.data.examples.GSM8K_COPY", "data/gsm8k")
    assert question() == "work/data/gsm8k?"
    shutil.rmtree("data")
    load_examples("gsm8k", "train")  # the folder `shared` beside it is nobody's business
    assert [name for name, *_ in hub] == ["openai/gsm8k"]
    monkeypatch.setenv("QUARTET_GSM8K", str(tmp_path / "gsm8k"))
    assert question() == "gsm8k?"
    monkeypatch.setenv("QUARTET_GSM8K", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="QUARTET_GSM8K=.*gone is no folder.*or unset it"):
        load_examples("gsm8k", "train")
