"""`quartet reward replay`: recorded completions under another reward, and the record that it leaves alone."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from grpo.cli.parse import main
from grpo.train import train
from review.readers.run_folder import read_metrics
from rewards.commands.options import ReplayConfig
from rewards.commands.replay import replay
from rewards.config.options import load
from rewards.records import read_rollouts

SOURCE = """
def letters(completions, **_):
    return [sum(c.isalpha() for c in text) / 20 for text in completions]

def half(completions, **_):
    return [0.5 * score for score in letters(completions)]

def of_reference(completions, reference):
    return [float(text == gold) for text, gold in zip(completions, reference)]

def needs_everything(completions, completion_ids, trainer_state, question, answer, level):
    assert all("####" in gold for gold in answer) and all(isinstance(n, int) for n in level)
    return [len(ids) + 100.0 * trainer_state.global_step for ids in completion_ids]

def fails_on_long(completions, **_):
    if any(len(text) > 8 for text in completions):
        raise ValueError("too long")
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "run"
    (folder.parent / "mine.py").write_text(SOURCE)
    rewards = [{"function": f"{folder.parent}/mine.py:letters", "weight": 2.0}, {"function": "gsm8k"}]
    train(micro_config(folder, steps=2, rewards=rewards, **{"sft.steps": 0}))
    return folder


def again(run: Path, function: str, **options):
    return replay(run, f"{run.parent}/mine.py:{function}", load(ReplayConfig, None, options))


def test_the_same_function_changes_nothing(run):
    result = again(run, "letters")
    assert result.against == "letters"
    assert [step.step for step in result.steps] == [1, 2]
    assert result.changes == []
    for step in result.steps:
        recorded = [line["parts"]["letters"] for line in read_rollouts(run, step.step)]
        assert step.completions == len(recorded) == 16
        assert step.before == step.after == pytest.approx(sum(recorded) / 16)
        assert step.tied_before == step.tied_after


def test_a_difference_is_shown_by_step_and_the_largest_change_first(run):
    result = again(run, "half", against="letters", steps=[2])
    [step] = result.steps
    assert step.after == pytest.approx(step.before / 2)
    lines = read_rollouts(run, 2)
    assert step.changed == len(result.changes) == sum(line["parts"]["letters"] > 0 for line in lines)
    sizes = [change.size for change in result.changes]
    assert sizes == sorted(sizes, reverse=True)
    longest = max(lines, key=lambda line: line["parts"]["letters"])
    assert result.changes[0].before == longest["parts"]["letters"]
    assert result.changes[0].after == longest["parts"]["letters"] / 2
    assert replay(run, "gsm8k_format", ReplayConfig()).against == "score"  # two rewards, neither of that name


def test_ids_columns_and_trainer_state_are_those_of_the_run(run):
    result = again(run, "needs_everything", against="score")
    after = {(c.step, c.prompt_id, c.sample): c.after for c in result.changes}
    for step in (1, 2):
        for line in read_rollouts(run, step):
            value = len(line["token_ids"]) + 100.0 * (step - 1)
            assert after.get((step, line["prompt_id"], line["sample"]), line["reward"]) == value


def test_failures_end_it_or_are_counted(run, capsys):
    function = f"{run.parent}/mine.py:fails_on_long"
    assert main(["reward", "replay", str(run), "--with", function]) == 1
    assert "raised: ValueError: too long (mine.py:" in capsys.readouterr().err
    long = [line for step in (1, 2) for line in read_rollouts(run, step) if len(line["text"]) > 8]
    assert long
    result = again(run, "fails_on_long", **{"reward.on_error": "drop_sample"})
    assert len(result.failures) == len(long)
    assert main(["reward", "replay", str(run), "--with", function, "--reward.on_error", "drop_sample"]) == 1
    assert "reward-fails: " in capsys.readouterr().out


def test_the_run_is_not_touched_and_json_goes_where_it_is_told(run, tmp_path, capsys):
    def digests():
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.rglob("*")) if p.is_file()}

    before = digests()
    out = tmp_path / "replay.json"
    words = ["reward", "replay", str(run), "--with", f"{run.parent}/mine.py:half", "--json", str(out)]
    assert main([*words, "--against", "letters"]) == 0
    shown = capsys.readouterr().out
    for part in ("against the recorded letters", "zero-variance", "changed most", "completions score differently"):
        assert part in shown
    assert digests() == before
    found = json.loads(out.read_text())
    assert len(found["steps"]) == 2
    assert {"step", "prompt_id", "sample", "before", "after", "completion"} <= found["changes"][0].keys()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{run}", "--with", "gsm8k", "--steps", "[1, 9]"], 1, "has no step 9; its steps are 1 to 2"),
        (["{run}", "--with", "gsm8k", "--against", "leters"], 1, "did you mean 'letters'?"),
        (["{run}", "--with", "{run}/../mine.py:half", "--arguments.x", "1"], 1, "no parameter 'x' to bind"),
        (["{run}", "--with", "gsm8"], 1, "did you mean 'gsm8k'?"),
        (
            ["{run}", "--with", "{run}/../mine.py:of_reference"],
            1,
            "asks for the column 'reference', which is not there",
        ),
        (["{run}/..", "--with", "gsm8k"], 1, "is no run folder: it has no config.yaml"),
        (["{run}", "--with", "gsm8k", "--reward.on_error", "drop_group"], 2, "on_error=drop_group"),
    ],
)
def test_what_is_not_there_is_named(run, capsys, words, code, message):
    assert main(["reward", "replay", *(word.format(run=run) for word in words)]) == code
    assert message in capsys.readouterr().err


def test_data_that_have_changed_are_refused(micro_config, tmp_path, letters):
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{n} + 1 = ?", "answer": f"#### {n + 1}"} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data.name": str(data), "sft.steps": 0, "steps": 1}
    train(micro_config(tmp_path / "run", **options))
    assert replay(tmp_path / "run", letters, ReplayConfig()).changes == []
    data.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    with pytest.raises(ValueError, match="have changed since the run: its prompt .* asks something else now"):
        replay(tmp_path / "run", letters, ReplayConfig())
    data.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="have changed since the run: its prompt .* now"):
        replay(tmp_path / "run", letters, ReplayConfig())
    data.unlink()
    with pytest.raises(FileNotFoundError, match="run this where the run was started"):
        replay(tmp_path / "run", letters, ReplayConfig())
    shutil.rmtree(tmp_path / "run" / "rollouts")
    with pytest.raises(ValueError, match="has recorded no rollouts yet"):
        replay(tmp_path / "run", letters, ReplayConfig())


def test_reward_models_scores_are_those_that_were_recorded(run, tmp_path):
    """A run with a reward model replays without the model: its scores stand in the rollout record."""
    import zstandard

    from rewards.config.yaml_file import parse_yaml, to_yaml

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = parse_yaml((copy / "config.yaml").read_text())
    config["rewards"] += [{"function": "model:models/reward", "name": "helpful", "weight": 0.0}]
    (copy / "config.yaml").write_text(to_yaml(config))
    for step in (1, 2):
        lines = [line | {"extras": {"helpful": line["sample"] / 8}} for line in read_rollouts(copy, step)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (copy / f"rollouts/step_{step:06d}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    result = replay(copy, "column", ReplayConfig(arguments={"name": "helpful"}))
    assert [step.after for step in result.steps] == [(0 + 1 + 2 + 3) / 4 / 8] * 2
    assert len(read_metrics(copy)) == 2


def test_no_steps_are_refused(run, capsys):
    assert main(["reward", "replay", str(run), "--with", "gsm8k", "--steps", "[]"]) == 1
    assert "steps=[]: name a step" in capsys.readouterr().err


def test_a_json_file_that_cannot_be_written_is_found_before_the_work(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "out.json"):
        assert main(["reward", "replay", str(run), "--with", "gsm8k", "--json", str(target)]) == 1
        shown = capsys.readouterr()
        assert "json: " in shown.err
        assert shown.out == ""
