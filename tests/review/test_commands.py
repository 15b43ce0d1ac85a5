"""The commands that read runs, as `quartet-review` and `quartet` have them, and what they answer to a wrong folder."""

import shutil
from pathlib import Path

import pytest

from grpo.cli import parse
from review.__main__ import main
from review.commands import commands

CASE = Path(__file__).parents[1] / "cases/run_to_view"
COMMANDS = tuple(commands())


def test_quartet_has_the_same_four():
    assert COMMANDS == ("view", "report", "compare", "diagnose")
    assert commands().items() <= parse._commands().items()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_folder_is_answered_with_the_way_out(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("several/first").mkdir(parents=True)
    Path("several/first/metrics.jsonl").touch()
    for folder, answer in {
        "nowhere": "there is no such folder",
        "empty": "is no run folder (no metrics.jsonl in it); name the output_dir of a run",
        "several": "name one of the runs in it, such as several/first",
    }.items():
        assert main([command, folder]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"quartet: RUN={folder}: ")
        assert error.endswith(f"{answer}\n")


@pytest.mark.parametrize("command", ["report", "compare", "diagnose"])
def test_a_damaged_file_is_named_with_its_line(command, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(CASE, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], "{", *lines[2:], ""]))
    assert main([command, str(folder)]) == 1
    assert capsys.readouterr().err.startswith(f"quartet: {folder / 'metrics.jsonl'}, line 3 is damaged: ")


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["daignose", "run"])
    assert ended.value.code == 2
    assert "did you mean quartet-review diagnose?" in capsys.readouterr().err
