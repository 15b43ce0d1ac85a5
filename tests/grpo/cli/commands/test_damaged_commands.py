"""Damaged files as a user of the commands meets them: one `quartet:` line that names the file, no traceback."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from grpo.cli.parse import main
from grpo.config.run import LogOptions
from grpo.run.log import RunLog
from grpo.train import train

BROKEN = {
    "raises": "{{ raise_exception('no \x1b[31msystem role') }}",
    "divides": "{{ 1 // 0 }}",
    "no jinja": "{% for m in messages %}",
    "undefined": "{{ nobody.knows.this }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(micro_config(folder, steps=2, **{"sft.steps": 0}))
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def resume(copy) -> list[str]:
    return ["train", str(copy / "config.yaml"), "--output_dir", str(copy), "--resume", "auto"]


def refused(words: list[str], capsys, *parts: str) -> None:
    assert main(words) in (1, 2)
    shown = capsys.readouterr().err
    assert shown.startswith("quartet: ")
    for part in parts:
        assert part in shown


@pytest.fixture(scope="module")
def chat_model(micro_policy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    micro_policy(0).save(folder)
    return folder


@pytest.mark.parametrize("fault", BROKEN)
def test_a_chat_template_that_fails_is_found_by_the_dry_run(chat_model, tmp_path, capsys, fault):
    (chat_model / "chat_template.jinja").write_text(BROKEN[fault])
    words = ["train", "--model", str(chat_model), "--output_dir", str(tmp_path / "r"), "--data.template", "chat"]
    words += ["--data.task_options.levels", "[1]", "--data.limit", "8", "--eval.limit", "2", "--dry_run"]
    refused(words, capsys, f"the chat template of '{chat_model}' (chat_template.jinja", "fails on the roles user: ")


def test_so_it_is_by_the_dry_run_of_mtp_and_only_where_it_is_used(chat_model, tmp_path, capsys):
    (chat_model / "chat_template.jinja").write_text(BROKEN["divides"])
    words = ["mtp", str(chat_model), "--output_dir", str(tmp_path / "r"), "--data.limit", "20", "--eval.limit", "2"]
    words += ["--rollout.max_completion_tokens", "16"]
    assert main([*words, "--dry_run"]) == 0
    refused([*words, "--data.template", "chat", "--dry_run"], capsys, str(chat_model), "ZeroDivisionError")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("garbage\n", "line 3 is damaged: Expecting value"),
        ('{"reward/mean": 1.0}\n', "line 3 is damaged: its step is None"),
        ('{"step": "3"}\n', "line 3 is damaged: its step is '3'"),
        ('{"step": 3, "reward/mean": "high"}\n', "line 3 is damaged: 'reward/mean' is 'high'"),
        ('{"step": 3, "reward/mean": 1e999}\n', "line 3 is damaged: 'reward/mean' is inf"),
        ("[1]\n", "line 3 is damaged: it holds a list"),
        ("\xff\n", "line 3 is damaged: 'utf-8' codec"),
    ],
)
def test_a_bad_line_in_the_metrics_is_named(copy, resume, capsys, line, message):
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("latin-1"))
    refused(["report", str(copy)], capsys, str(copy / "metrics.jsonl"), message)
    refused(resume, capsys, message)


def test_damaged_records_of_the_machine_and_of_rewards_are_named(copy, resume, capsys):
    for content in ("", "null", "[]", "{}", '{"hardware": null}', "\x00", "[" * 5000):
        (copy / "environment.json").write_text(content)
        refused(["report", str(copy)], capsys, str(copy / "environment.json"))
    for content in ("", "null", "{}", "[1]", '[{"name": "x"}]', "[" * 5000):
        (copy / "rewards.json").write_text(content)
        refused(resume, capsys, str(copy / "rewards.json"))


def test_damaged_configs_and_rollouts_of_a_run_are_named(copy, capsys):
    path = copy / "rollouts/step_000001.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-20])
    replay = ["reward", "replay", str(copy), "--with", "gsm8k"]
    refused(replay, capsys, str(path), "is damaged")
    file = copy / "config.yaml"
    for content in ("", "null\n", "data: null\n", "data: {name: [}\n", "a: &a [*a]\n", "data: 3\n"):
        file.write_text(content)
        for words in (["eval", str(copy)], ["mtp", str(copy), "--output_dir", str(copy / "m")], replay):
            refused(words, capsys, str(file))
        refused(["export", str(copy), str(copy / "new")], capsys, str(file) if content else "config.yaml")


@pytest.mark.parametrize("name", ["environment.json", "config.yaml"])
def test_a_full_disk_at_the_start_names_the_file(tmp_path, monkeypatch, name):
    replace = os.replace

    def full(partial, path):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(partial, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=rf"No space left on device: '.*{name}'"):
        RunLog(tmp_path / "run", "steps: 1\n", LogOptions(trackers=[]))


def test_numbers_that_are_json_and_no_metric_are_no_traceback(copy, capsys):
    lines = [json.dumps({"step": step, "reward/mean": 1e308, "policy/entropy": 0.1}) + "\n" for step in (1, 2)]
    (copy / "metrics.jsonl").write_text("".join(lines))
    assert main(["report", str(copy)]) == 0
