"""What a stranger may put in a run folder instead of the files of a run."""

import os
import shutil
from pathlib import Path

import pytest
import zstandard

from grpo.view.reading import check_files, read_step
from grpo.view.run_files import RunFiles
from rewards.records import rollout_path

CASE = Path(__file__).parents[2] / "cases/run_to_view"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CASE, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("ask", [lambda run: run.step(2), lambda run: run.overview(), lambda run: run.events()])
def test_pipes_and_devices_are_not_read(folder, ask):
    for path in (rollout_path(folder, 2), folder / "events.jsonl", folder / "config.yaml"):
        path.unlink()
        os.mkfifo(path)  # reading one would wait for a writer for ever
    with pytest.raises(ValueError, match="is no plain file, so it is not read"):
        ask(RunFiles(folder))


def test_a_link_to_a_device_is_not_read(folder):
    rollout_path(folder, 2).unlink()
    rollout_path(folder, 2).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is no plain file"):
        read_step(folder, 2)


def test_a_large_file_is_not_read(folder, monkeypatch):
    with open(folder / "metrics.jsonl", "ab") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(ValueError, match=r"metrics.jsonl has 512 MiB; the page reads 512 at most"):
        RunFiles(folder).overview()
    monkeypatch.setattr("grpo.view.reading.MOST_BYTES", 100_000)
    rollout_path(folder, 2).write_bytes(zstandard.ZstdCompressor().compress(b" " * 2**20))
    assert rollout_path(folder, 2).stat().st_size < 100
    with pytest.raises(ValueError, match="would unpack to 1 MiB; the page reads 0 at most"):
        read_step(folder, 2)


def test_files_that_are_not_there_pass(folder):
    check_files(folder / "nothing")
    with pytest.raises(FileNotFoundError, match="no rollouts of step 9"):
        read_step(folder, 9)
