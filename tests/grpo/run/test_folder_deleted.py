"""The folder of a run, or a file that it writes into, is deleted while it runs."""

import os

import pytest

from grpo.cli.parse import main
from grpo.run.json_lines import append_line, open_lines
from review.readers.run_folder import read_metrics
from rewards.config.options import to_yaml

REWARD = """
import os, shutil
def letters(completions, trainer_state, **_):
    if trainer_state.global_step == 2 and not os.path.exists({gone!r} + ".done"):
        open({gone!r} + ".done", "w").close()
        (shutil.rmtree if os.path.isdir({gone!r}) else os.unlink)({gone!r})
    return [sum(c.isalpha() for c in completion) / 20 for completion in completions]
"""


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        pytest.param("run", "output_dir: [Errno 2] No such file or directory: ", marks=pytest.mark.slow),
        ("run/metrics.jsonl", "run/metrics.jsonl was deleted, moved or replaced while the run wrote to it"),
    ],
)
def test_the_run_ends_with_a_message_and_goes_on(micro_config, tmp_path, capsys, gone, said):
    reward = tmp_path / "deletes.py"
    reward.write_text(REWARD.format(gone=str(tmp_path / gone)))
    given = {"rewards": [{"function": f"{reward}:letters"}], "sft.steps": 0}
    config = micro_config(tmp_path / "run", **given)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config.model_dump(mode="json")))
    assert main(["train", str(file)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert main(["train", str(file), "--resume", "auto"]) == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_line_is_written_to_the_file_that_has_its_name(tmp_path):
    file = tmp_path / "lines.jsonl"
    with open_lines(file) as stream:
        append_line(stream, {"step": 1})
        os.rename(file, tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match="lines.jsonl"):
            append_line(stream, {"step": 2})
        os.rename(tmp_path / "moved", file)
        append_line(stream, {"step": 2})
        (tmp_path / "new").write_text("")
        os.replace(tmp_path / "new", file)
        with pytest.raises(FileNotFoundError, match="was deleted, moved or replaced"):
            append_line(stream, {"step": 3})
