"""Every command that takes a model takes a GGUF file, or refuses it by name."""

import json

import pytest

from grpo.cli.parse import main
from grpo.source.policy_source import find_policy, known_context
from policies.policy import Policy, PolicyError
from tests.cases.gguf_file import write_gguf

SHORT = ["--rollout.max_completion_tokens", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    write_gguf(path)
    return str(path)


def test_a_file_is_a_policy_and_a_misspelt_one_is_no_file(file):
    assert find_policy(file).folder == file
    assert known_context(file) == 512
    for name in "nowhere.gguf", f"{file[:-5]}s.gguf", "models/nowhere.gguf":
        with pytest.raises(PolicyError, match="there is no such file"):
            find_policy(name)


def test_inspect_sample_evaluate_and_convert(file, tmp_path, capsys):
    assert main(["policy", "inspect", file, "--json", str(tmp_path / "parts.json")]) == 0
    assert json.loads((tmp_path / "parts.json").read_text())["model_type"] == "llama"
    assert main(["sample", file, "--prompt", "2 + 3 =", "--json", str(tmp_path / "said.json"), *SHORT]) == 0
    assert len(json.loads((tmp_path / "said.json").read_text())["groups"]) == 1
    assert main(["eval", file, "--eval.limit", "2", "--eval.samples", "0", *SHORT]) == 0
    assert "2 problems" in capsys.readouterr().out
    assert main(["convert", file, str(tmp_path / "mla"), "--threads", "1"]) == 0
    assert Policy.load(tmp_path / "mla").backend == "native"


@pytest.mark.slow
def test_train_dry_and_for_a_step_on_a_folder_that_holds_the_file(file, tmp_path, capsys):
    run = str(tmp_path / "run")
    words = ["--model", str(find_policy(file).folder).rpartition("/")[0], "--output_dir", run, "--steps", "1"]
    words += ["--prompts_per_step", "1", "--rollout.group_size", "2", "--rollout.max_completion_tokens", "4"]
    words += ["--lora.rank", "2", "--threads", "1", "--log.trackers", "[]", "--data.task_options.levels", "[1]"]
    assert main(["train", *words, "--dry_run"]) == 0
    assert main(["train", *words]) == 0
    assert Policy.load(tmp_path / "run/policy").config.model_type == "llama"
    capsys.readouterr()
    assert main(["export", run, str(tmp_path / "adapter"), "--adapter"]) == 1
    assert "is a GGUF file, which peft cannot load by name; drop --adapter" in " ".join(capsys.readouterr().err.split())
    assert main(["export", run, str(tmp_path / "exported")]) == 0
