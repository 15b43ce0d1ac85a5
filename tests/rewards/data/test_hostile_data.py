"""Data, prompts and configurations that would lose something silently, hang or end in a traceback: refused by place."""

import csv
import json
from pathlib import Path

import pytest

from grpo.cli.commands.sample import read_prompts
from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from grpo.task.task import LONGEST_TEXT, Task
from rewards.config.options import ConfigError, load
from rewards.config.yaml_file import parse_yaml, read_yaml
from rewards.data.examples import CHARACTERS_PER_TOKEN, load_examples

GOOD = {"question": "2 + 3 = ?", "answer": "#### 5"}
SURROGATE = r'{"question": "q37\ud83d", "answer": "#### 5"}'


def jsonl(folder: Path, *lines: str, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


DEEPEST = 100_000  # no Python reads so many
NESTED = '{"question": "q", "answer": "1", "more": ' + "[" * DEEPEST + "]" * DEEPEST + "}"
DEEP = '{"question": "q", "answer": "1", "more": ' + "[" * 200 + "]" * 200 + "}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SURROGATE, r"row 2: 'question' holds the lone surrogate '\\ud83d'"),
        (r'{"question": "q", "answer": "1", "hint": {"a": ["\udc00"]}}', r"row 2: 'hint' holds the lone surrogate"),
        (r'{"question": "q", "answer": "1", "\ud83d": 1}', r"row 2: '\\ud83d' holds the lone surrogate"),
        ('{"question": "q", "answer": "1", "answer": "2"}', r"row 2: not JSON \(the key 'answer' is there twice"),
        ('{"question": "q", "answer": "1", "x": {"a": 1, "a": 1}}', r"row 2: not JSON \(the key 'a' is there twice"),
        (NESTED, r"row 2: not JSON \(nested more than 100 levels deep"),
        (DEEP, r"row 2: 'more' is nested more than 100 levels deep"),
    ],
)
def test_a_hostile_row_is_a_bad_row_by_number(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load_examples(jsonl(tmp_path, GOOD, line, GOOD), "train")
    [example] = load_examples(jsonl(tmp_path, r'{"question": "q\ud83d\ude00", "answer": "1"}'), "train")
    assert example.question == "q😀"  # a whole pair


def test_one_json_file_is_judged_alike(tmp_path):
    for text in ('[{"question": "q", "question": "r", "answer": "1"}]', "[" * DEEPEST):
        file = tmp_path / "data.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=r"data.json must hold a JSON list of objects: .*(twice|nested)"):
            load_examples(str(file), "train")
    file.write_text(f"[{json.dumps(GOOD)}, {SURROGATE}]")
    with pytest.raises(ValueError, match=r"row 2: 'question' holds the lone surrogate"):
        load_examples(str(file), "train")


def never(*_, **__):
    pytest.fail("a text of 10 MB reached a tokenizer")


@pytest.fixture
def no_tokenizer(monkeypatch):
    """These tests would take minutes where a tokenizer reads the long text; so they say it at once."""
    monkeypatch.setattr("policies.presets.small_tokenizer", never)


@pytest.mark.parametrize(("command", "kind"), [("train", "jsonl"), ("train", "csv"), ("sft", "word"), ("mtp", "word")])
def test_a_prompt_of_ten_megabytes_is_a_bad_row_by_number(tmp_path, capsys, no_tokenizer, kind, command):
    text = "a" * 10_000_000 if kind == "word" else "2 + 3 = " * 1_250_000
    if kind == "csv":
        csv.field_size_limit(20_000_000)
        file = str(tmp_path / "data.csv")
        with open(file, "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([["question", "answer"], ["q", "1"], [text, "1"]])
    else:
        file = jsonl(tmp_path, GOOD, {"question": text, "answer": "#### 5"}, GOOD)
    words = [command, "--output_dir", str(tmp_path / "r"), "--model", "tiny", "--data.name", file]
    try:
        assert main([*words, "--eval.limit", "0"]) == 1
    finally:
        csv.field_size_limit(131_072)
    shown = capsys.readouterr().err
    assert "row 2: 'question' has 10,000,000 characters, more than a context of 512 tokens can hold" in shown
    assert not (tmp_path / "r").exists()


def test_a_solution_that_is_learned_from_must_fit_too(tmp_path, micro_preset):
    file = jsonl(tmp_path, GOOD, {"question": "q", "answer": "a" * 1_000_000})
    options = {"output_dir": tmp_path / "r", "data.name": file, "model": micro_preset, "eval.limit": 0}
    options |= {"rewards": [{"function": "length_penalty", "arguments": {"target": 1}}], "prompts_per_step": 2}
    with pytest.raises(ValueError, match=r"row 2: 'answer' has 1,000,000 characters"):
        Task.of(load(TrainConfig, None, options | {"sft.steps": 1, "sft.batch_size": 2}))
    with Task.of(load(TrainConfig, None, options | {"sft.steps": 0})) as task:  # a reward may read what it likes
        assert max(map(len, task.corpus())) == LONGEST_TEXT  # and the tokenizer of a preset learns from its beginning


def test_what_a_template_makes_long_is_refused_before_it_is_tokenised(tmp_path, random_policy, micro_config):
    policy = random_policy(0)
    file = jsonl(tmp_path, *[GOOD | {"story": "s" * (CHARACTERS_PER_TOKEN * policy.max_length)}] * 4)
    options = {"data.name": file, "data.template": "{story}{question}", "sft.steps": 0}
    with Task.of(micro_config(tmp_path / "r", **options)) as task:
        policy.tokenizer = None
        with pytest.raises(ValueError, match=r"prompt of '.*/data/0' has .* characters, more than a context of 256"):
            task.check_lengths(policy, 10)


def test_eval_and_sample_refuse_a_prompt_of_ten_megabytes(tmp_path, micro_policy, capsys):
    micro_policy(0).save(tmp_path / "model")
    long = "a" * 10_000_000
    data = jsonl(tmp_path, GOOD, {"question": long, "answer": "#### 5"}, name="test.jsonl")
    assert main(["eval", str(tmp_path / "model"), "--data", data, "--threads", "1"]) == 1
    assert "row 2: 'question' has 10,000,000 characters" in capsys.readouterr().err
    prompts = jsonl(tmp_path, {"prompt": "a"}, {"prompt": long}, name="prompts.jsonl")
    assert main(["sample", str(tmp_path / "model"), "--prompts", prompts, "--threads", "1"]) == 1
    assert "line 2: the prompt has 10,000,000 characters" in capsys.readouterr().err


def test_a_hostile_line_of_prompts_is_named(tmp_path):
    for line, message in (
        (r'{"prompt": "q\ud83d"}', "line 2: holds the lone surrogate"),
        ('{"prompt": "q", "prompt": "r"}', "line 2: not JSON .the key 'prompt' is there twice"),
        ("[" * DEEPEST, "line 2: not JSON .nested more than 100 levels deep"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(Path(jsonl(tmp_path, {"prompt": "a"}, line)))


def bomb(line: str) -> str:
    return line.format(1, "[x, x]") + "".join(line.format(i, f"[*a{i - 1}, *a{i - 1}]") for i in range(2, 60))


YAML = {
    "itself": ("steps: &a [*a]\n", "contains itself"),
    "itself in a mapping": ("data: &a\n  name: *a\n", "contains itself"),
    "itself merged": ("data: &a\n  <<: *a\n", "contains itself"),
    "lists of lists": (bomb("a{0}: &a{0} {1}\n"), "more than 100,000 values"),
    "merged": ("a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
               "more than 100,000 values"),
    "one key again and again": ("a0: &a0 1\n" + "".join(f"a{i}: &a{i} {{k: *a{i - 1}, k: *a{i - 1}}}\n"
                                                        for i in range(1, 60)), "more than 100,000 values"),
    "a bomb as a key": (bomb("a{0}: &a{0} {1}\n") + "? *a59\n: 1\n", "more than 100,000 values"),
    "deep": ("steps: " + "[" * 600, "nested more than 100 levels deep"),
    "deep mapping": ("".join("  " * i + "a:\n" for i in range(300)), "nested more than 100 levels deep"),
    "a lone surrogate": ('output_dir: "\\ud83d"\n', "lone surrogate"),
    "a tag": ("steps: !!set {1}\n", "could not determine a constructor"),
    "not of its tag": ("steps: !!bool maybe\n", "not of its type"),
    "digits": (f"steps: {'1' * 5000}\n", "not of its type"),
    "bytes": ("a: 1\n" * 300_000, "1,500,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_configuration_is_refused_by_name(tmp_path, capsys, name):
    text, message = YAML[name]
    file = tmp_path / "hostile.yaml"
    file.write_text(text)
    assert main(["train", str(file), "--output_dir", str(tmp_path / "r")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("quartet: the configuration is not usable:\n")
    assert str(file) in shown
    assert message in shown


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 300, '{"function": &a {x: *a}}', "'\ud83d'", "b\udcff"])
def test_a_hostile_value_on_the_command_line_is_refused_by_its_key(tmp_path, capsys, value):
    assert main(["train", "--output_dir", str(tmp_path / "r"), "--rewards", value]) == 2
    assert "rewards" in capsys.readouterr().err


def test_aliases_that_multiply_nothing_are_fine(tmp_path):
    file = tmp_path / "fine.yaml"
    file.write_text("a: &a {x: 1}\nb: *a\nc: [*a, *a]\nd: {<<: *a, y: 2}\n")
    data, _ = read_yaml(file)
    assert data == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}] * 2, "d": {"x": 1, "y": 2}}
    assert parse_yaml("[1, 1e-3, no]") == [1, 0.001, "no"]
    file.write_text("a: &a [1]\nb: !!str 3\n")
    assert read_yaml(file)[0] == {"a": [1], "b": "3"}


def test_a_template_with_a_lone_surrogate_is_no_option():
    with pytest.raises(ConfigError, match="data.template .command line.: holds the lone surrogate"):
        load(TrainConfig, None, {"output_dir": "r", "data.template": "{question}\udcff"})
