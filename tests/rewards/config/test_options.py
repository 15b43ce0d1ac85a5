import argparse
import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator

from grpo.cli.config.inference import SampleConfig
from grpo.config.run import TrainConfig
from rewards.config import names
from rewards.config.options import ConfigError, Options, add_options, dump_yaml, load, parse, reference_page
from rewards.config.yaml_file import parse_yaml, to_yaml


class DraftOptions(Options):
    depth: int = 4
    """Tokens drafted per forward."""
    margin: float = 0.0
    """How far a draft may miss."""


class RolloutOptions(Options):
    group_size: int = Field(default=8, ge=2)
    """Completions per prompt; 100 % of them are scored."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    draft: DraftOptions = DraftOptions(depth=2)
    """How drafts are made."""

    @field_validator("group_size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"rollout.group_size={value} is odd; use {value + 1}")
        return value


class LoraOptions(Options):
    rank: int = 16
    """Rank of the adapter."""
    alpha: float = 32.0
    """Scale of the adapter."""


class RewardOptions(Options):
    function: str
    """Name, or path/to/file.py:function."""
    weight: float = 1.0
    """Its share in the score."""


class TrainOptions(Options):
    model: str
    """A preset or a folder."""
    output_dir: Path = Path("runs/demo")
    """Where the run is written."""
    steps: int = 10
    """How many steps."""
    loss: Literal["grpo", "dapo"] = "grpo"
    """Which loss."""
    levels: list[int] = Field(default_factory=lambda: [1, 2])
    """Difficulty levels."""
    columns: dict[str, Any] = Field(default_factory=dict)
    """Renamed columns."""
    seed: int | Literal["random"] = 0
    """Seed of the run."""
    note: str | None = None
    """A word for the reader."""
    rollout: RolloutOptions = RolloutOptions(temperature=0.5)
    """How completions are sampled."""
    lora: LoraOptions | None = None
    """Train an adapter."""
    rewards: list[RewardOptions] = Field(default_factory=lambda: [RewardOptions(function="gsm8k")])
    """What is rewarded."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quartet")
    train = parser.add_subparsers(required=True).add_parser("train")
    train.add_argument("config", type=Path, nargs="?")
    train.add_argument("--dry_run", "--dry-run", action="store_true")
    add_options(train, TrainOptions)
    return parser


def _train(*words: str) -> TrainOptions:
    args = parse(_parser(), ["train", *words])
    return load(TrainOptions, args.config, args.overrides, args.flags)


def _problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _train(*words)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.fixture
def yaml(tmp_path: Path):
    def write(text: str, name: str = "demo.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_defaults_then_file_then_command_line(yaml):
    file = yaml("model: tiny\nsteps: 3\nrollout:\n  group_size: 4\n  draft: {margin: 1e-3}\n")
    config = _train(file, "--steps", "5", "--rollout.temperature", "2", "--output_dir", "12")
    assert (config.model, config.steps, config.output_dir) == ("tiny", 5, Path("12"))
    assert (config.rollout.group_size, config.rollout.temperature) == (4, 2.0)
    assert config.rollout.draft == DraftOptions(depth=2, margin=0.001)
    config = _train(yaml("model: tiny\nrollout: {group_size: 4}\n"))
    assert config.rollout.temperature == 0.5  # the default of `rollout`, not of RolloutOptions
    assert config.rollout.draft.depth == 2
    assert _train("--model", "tiny", "--steps", "2", "--steps", "3").steps == 3
    overrides = {"model": "tiny", "lora": {"rank": 8}, "lora.alpha": 1.0}
    load(TrainOptions, None, overrides)
    assert overrides["lora"] == {"rank": 8}  # it leaves its arguments alone


def test_values_are_yaml():
    config = _train(
        *("--model", "tiny", "--levels", "[3,4]", "--columns", "{q: question}", "--seed", "random"),
        *("--rewards", "[{function: a.py:score, weight: 1e-1}]", "--columns.answer", "solution"),
    )
    assert config.levels == [3, 4]
    assert config.columns == {"q": "question", "answer": "solution"}
    assert config.seed == "random"
    assert config.rewards == [RewardOptions(function="a.py:score", weight=0.1)]
    config = _train("--model", "007", "--note", "a: b # [c", "--output_dir", "null")  # texts are taken as they stand
    assert (config.model, config.note, config.output_dir) == ("007", "a: b # [c", Path("null"))
    assert _train("--model", "tiny", "--note", "null").note is None


def test_an_optional_mapping_is_switched_on_by_its_options(yaml):
    assert _train("--model", "tiny").lora is None
    assert _train("--model", "tiny", "--lora.rank", "8").lora == LoraOptions(rank=8)
    file = yaml("model: tiny\nlora: {alpha: 2}\n")
    assert _train(file, "--lora.rank", "8").lora == LoraOptions(rank=8, alpha=2)
    assert _train(file, "--lora", "null").lora is None
    assert _train(file, "--lora", "null", "--lora.rank", "8").lora == LoraOptions(rank=8)
    assert _train(file, "--lora.rank", "8", "--lora", "null").lora is None


def test_all_problems_come_at_once_each_with_key_value_place_and_way_out(yaml):
    file = yaml(
        "steps: many\nrollout:\n  group_size: 1\n  temprature: 2\nlora: 5\n"
        "rewards:\n  - functoin: gsm8k\nseed: 1.5\ngroup_size: 8\n"
    )
    assert _problems(file, "--loss", "ppo", "--rollout.groupsize", "8", "--levels", "[1,x]") == [
        "model: is required",
        f"steps=many ({file}, line 1): expected a valid integer, unable to parse string as an integer",
        "loss=ppo (command line): expected 'grpo' or 'dapo'",
        "levels[1]=x (command line): expected a valid integer, unable to parse string as an integer",
        f"seed=1.5 ({file}, line 8): expected a valid integer, got a number with a fractional part"
        " or expected 'random'",
        f"rollout.group_size=1 ({file}, line 3): expected greater than or equal to 2",
        f"rollout.temprature=2 ({file}, line 4): no such option; did you mean rollout.temperature?",
        "rollout.groupsize=8 (command line): no such option; did you mean rollout.group_size?",
        f"lora=5 ({file}, line 5): expected a mapping of options",
        f"rewards[0].function ({file}, line 7): is required",
        f"rewards[0].functoin=gsm8k ({file}, line 7): no such option; did you mean rewards[].function?",
        f"group_size=8 ({file}, line 9): no such option; did you mean rollout.group_size?",
    ]


NO_SUCH = "(command line): no such option; did you mean"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--rollout.temperature", "-1e-3"], "rollout.temperature=-0.001 (command line): expected greater than 0"),
        (["--rollout.temperature=-1e-3"], "rollout.temperature=-0.001 (command line): expected greater than 0"),
        (["--rollout.group_size", "3"], "rollout.group_size=3 is odd; use 4 (command line)"),  # says the validator
        (["--dry_rum"], f"dry_rum {NO_SUCH} dry_run?"),
        (["--stepz", "3"], f"stepz=3 {NO_SUCH} steps?"),
        (["--rank=3"], f"rank=3 {NO_SUCH} lora.rank?"),
        (["--rolout.draft.depth", "3"], f"rolout.draft.depth=3 {NO_SUCH} rollout.draft.depth?"),
        (["--rollout.group-size", "4"], f"rollout.group-size=4 {NO_SUCH} rollout.group_size?"),
        (["--roll", "4"], f"roll=4 {NO_SUCH} rollout?"),
        (["--zzz", "1"], "zzz=1 (command line): no such option; see --help all for all options"),
        (
            ["--rewards", "[{function: gsm8k}]", "--rewards.0.weight", "2"],
            "rewards.0.weight=2 (command line): rewards is a list of 1; change it in the file, or give all of it: "
            "--rewards '[...]'",
        ),
    ],
)
def test_a_word_that_is_wrong_is_named_with_the_way_out(yaml, words, problem):
    assert _problems("--model", "tiny", *words) == [problem]
    if len(words) == 2:
        assert _problems(*words, yaml("model: tiny\n")) == [problem]  # the file is no second value


def test_a_word_that_follows_no_option_or_a_command_without_options(yaml):
    with pytest.raises(ConfigError, match=r"^extra: this word follows no option"):
        parse(_parser(), ["train", yaml("model: tiny"), "extra"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    with pytest.raises(ConfigError, match=r"^jsn=x .*did you mean json"):
        parse(parser, ["--jsn", "x"])
    assert parse(parser, ["--json", "x"]).overrides == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "{file}: is empty; write options such as `steps: 10`, or name no file"),
        ("# steps: 3\n", "{file}: is empty; write options such as `steps: 10`, or name no file"),
        ("- steps\n", "{file}: expected a mapping such as `steps: 10`, got [steps]"),
        ("steps: 3\nlora:\n  rank: 1\nsteps: 4\n", "{file}: steps is given on lines 1 and 4; keep one"),
        ("rewards:\n- w: 1\n  w: 2\n", "{file}: rewards[0].w is given on lines 2 and 3; keep one"),
        ("steps: [3\n", "{file}, line 2: is not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(yaml, text, problem):
    file = yaml(text)
    assert _problems(file) == [problem.format(file=file)]
    [problem] = _problems(yaml("model: tiny\nnote: !!python/name:os.system\n"))  # it builds no object of Python
    assert "line 2: is not valid YAML: could not determine a constructor" in problem
    file = yaml("model: tiny\nlora: &a {rank: 1, alpha: 2}\ncolumns: {<<: *a, rank: 3}\n")
    assert _train(file).columns == {"rank": 3, "alpha": 2}  # a merge key repeats none


def test_a_missing_file_names_the_nearest(yaml, tmp_path):
    yaml("model: tiny", "01_demo.yaml"), yaml("model: tiny", "02_custom_reward.yaml")
    missing = tmp_path / "01_dmo.yaml"
    assert _problems(str(missing)) == [f"{missing}: no such file; did you mean {tmp_path / '01_demo.yaml'}?"]
    nowhere = tmp_path / "nowhere" / "01_demo.yaml"
    assert _problems(str(nowhere)) == [f"{nowhere}: no such file; there is no folder {nowhere.parent}"]
    (tmp_path / "empty").mkdir()
    [found] = _problems(str(tmp_path / "empty" / "a.yaml"))
    assert found.endswith("empty holds no .yaml file")


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(_parser(), ["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "--steps int How many steps. (default: 10)",
        "--loss grpo|dapo Which loss. (default: grpo)",
        "--output_dir Path Where the run is written. (default: runs/demo)",
        "--model str A preset or a folder. (required)",
        "--seed int|random Seed of the run. (default: 0)",
        "--rewards list[mapping] What is rewarded. Each item: function, weight.",
        "--lora mapping|null Train an adapter. (default: null)",
        "--lora.rank int Rank of the adapter. (default: 16)",
        "rollout: How completions are sampled.",
        "--rollout.group_size int ≥ 2 Completions per prompt; 100 % of them are scored. (default: 8)",
        "--rollout.temperature float > 0 Sampling temperature. (default: 0.5)",
        "--rollout.draft.depth int Tokens drafted per forward. (default: 2)",
    ):
        assert line in text


def test_the_reference_has_a_row_for_every_option():
    page = reference_page(TrainOptions).splitlines()
    assert page[:2] == ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    assert r"| `loss` | `grpo\|dapo` | `grpo` | Which loss. |" in page
    assert "| `rollout` | `mapping` |  | How completions are sampled. |" in page
    assert "| `rewards[].function` | `str` | required | Name, or path/to/file.py:function. |" in page
    assert len(page) == 2 + 11 + 3 + 2 + 2 + 2  # heads, top, rollout, its draft, lora, rewards


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))


tricky = st.sampled_from(["on", "no", "1e-3", "007", "null", "2026-01-31", "12:30", "1_0", "~", "=", "<<"])
number = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=30)
@given(
    model=text | tricky,
    note=st.none() | text,
    temperature=st.floats(min_value=1e-12, max_value=1e12),
    columns=st.dictionaries(text | tricky, st.none() | st.booleans() | number | text),
    lora=st.none() | st.builds(LoraOptions, rank=st.integers()),
)
def test_the_dump_loads_as_the_same_configuration(tmp_path_factory, model, note, temperature, columns, lora):
    rollout = RolloutOptions(temperature=temperature)
    config = TrainOptions(model=model, note=note, columns=columns, lora=lora, rollout=rollout)
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load(TrainOptions, file, {}) == config


def test_yaml_scalars_hold_no_surprises_and_a_dump_keeps_the_order():
    keys = [line.split(":")[0] for line in dump_yaml(TrainOptions(model="tiny")).splitlines() if line[0].isalpha()]
    assert keys == list(TrainOptions.model_fields)
    values = parse_yaml("[1e-3, 1_000, -.5, 007, on, no, 12:30, 2026-01-31, ~, true, .inf]")
    assert values == [0.001, 1000, -0.5, "007", "on", "no", "12:30", "2026-01-31", None, True, float("inf")]
    assert to_yaml(["on", 1e-5, datetime.date(2026, 1, 31)], inline=True) == "['on', 1.0e-05, '2026-01-31']"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (r"{question}\n", "{question}\n"),
        (r"Be brief.\n\nQuestion: {question}", "Be brief.\n\nQuestion: {question}"),
        (r"\text{a} \boxed{}", r"\text{a} \boxed{}"),
        (r"\\nabla {question}", r"\nabla {question}"),
        ("{question}\n", "{question}\n"),
        ("{question}: {answer}", "{question}: {answer}"),
        ("[INST] {question} [/INST]", "[INST] {question} [/INST]"),
        ("{system: Be brief.}", {"system": "Be brief."}),  # messages
        ('{"user": "{question}\\n"}', {"user": "{question}\n"}),
    ],
)
def test_a_text_of_lines_has_line_breaks_as_help_shows_them(typed, read, tmp_path):
    """`--template '{question}\n'` in a shell hands over a backslash and an n."""
    for config in (TrainConfig, SampleConfig):
        parser = argparse.ArgumentParser()
        add_options(parser, config)
        assert parse(parser, ["--data.template", typed]).overrides == {"data.template": read}
    (tmp_path / "a.yaml").write_text("output_dir: r\ndata: {template: '\\neg {question}'}\n")
    assert load(TrainConfig, tmp_path / "a.yaml", {}).data[0].template == r"\neg {question}"


def test_what_an_older_version_had_is_refused_by_name_and_left_out_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_removed", lambda: {"rollout.sync_deltas": ("it gained nothing", False)})
    file = tmp_path / "old.yaml"
    file.write_text("output_dir: runs/a\nrollout:\n  sync_deltas: true\n  group_size: 4\n")
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, file, {})
    [problem] = error.value.problems
    assert problem.startswith(f"rollout.sync_deltas=true ({file}, line 3): it is gone, since")
    words: list[str] = []
    config = load(TrainConfig, file, {"rollout.sync_deltas": True}, on_removed=words.append)
    assert config.rollout.group_size == 4
    assert [word.partition(":")[0] for word in words] == ["rollout.sync_deltas=true"]
    assert load(TrainConfig, file, {"rollout.sync_deltas": False}).rollout.group_size == 4  # its default says nothing
