"""One run at a time writes into a folder, and a dead one blocks nobody."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from copies import Copy

from grpo.cli.mtp import mtp
from grpo.config.mtp import MtpConfig
from grpo.config.run import LogOptions, SftConfig
from grpo.run import lock
from grpo.run.lock import FolderInUse, RunLock
from grpo.run.log import RunLog
from grpo.run.stop import Stopped
from grpo.sft import sft
from grpo.steps.collector import Collector
from grpo.steps.loop import Run
from grpo.train import train
from review.readers.run_folder import read_metrics

ROOT = Path(__file__).parents[3]
HOLDS = """
import subprocess, sys, time
from pathlib import Path
from grpo.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.lock_folder()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_refusal_names_process_and_host_and_ends_with_that_process(tmp_path, number):
    """Also where a program that it has started outlives it."""
    holder = Copy([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(FolderInUse, match=rf"process {holder.pid} on host {re.escape(socket.gethostname())}\)"):
            RunLock(tmp_path)
        holder.send_signal(number)
        holder.wait(timeout=20)
        with RunLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()


def test_a_folder_that_is_not_there_is_made_by_taking_it(tmp_path):
    with RunLock(tmp_path / "a/b") as lock:
        assert not (tmp_path / "a").exists()
        lock.lock_folder()
        lock.lock_folder()
        with pytest.raises(FolderInUse):
            RunLock(tmp_path / "a/b")
    RunLock(tmp_path / "a/b")


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    RunLock(tmp_path)
    assert "cannot be locked (" in caplog.text


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_refuses_the_folder_of_another_one(micro_config, micro_preset, tmp_path):
    folder = tmp_path / "run"
    config = micro_config(folder)
    options = config.model_dump(include={"threads", "data", "rewards", "log"})
    options |= {"model": micro_preset, "output_dir": folder, "prompts_per_step": 4}
    starts = [(train, config), (sft, SftConfig(**options)), (mtp, MtpConfig(**options))]
    with RunLog(folder, "steps: 3\n", LogOptions(trackers=[]), quiet=True) as log:  # before its first step, too
        before = _files(folder)
        for start, given in starts:
            for resume in (None, "auto"):
                with pytest.raises(FolderInUse, match=f"process {os.getpid()} on host .*choose another output_dir"):
                    start(given, resume=resume)
        log.step(1, {"reward/mean": 1.0})
        assert _files(folder).keys() == before.keys()
    assert [line["step"] for line in read_metrics(folder)] == [1]


@pytest.mark.slow
def test_the_lock_is_free_after_a_refusal_a_stop_a_failure_and_the_end(micro_config, tmp_path, monkeypatch):
    folder, given = tmp_path / "run", {"sft.steps": 0, "eval.limit": 0, "rollout.max_completion_tokens": 4}
    with Run.open(micro_config(folder, **given), 3, []), pytest.raises(FolderInUse):
        train(micro_config(folder, **given), resume="auto")
    with pytest.raises(Stopped):
        train(micro_config(folder, **given), stop_after=1)
    RunLock(folder).release()
    with pytest.raises(ValueError, match="another configuration") as refusal:
        train(micro_config(folder, seed=3, **given), resume="auto")
    RunLock(folder).release()
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as failure:
            train(micro_config(folder, **given), resume="auto")
    RunLock(folder).release()
    train(micro_config(folder, **given), resume="auto")
    RunLock(folder).release()
    assert refusal
    assert failure  # they keep what they were raised in alive


def test_two_demos_of_one_second_get_folders_of_their_own():
    shown = [subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout for _ in range(2)]
    assert len({name for text in shown for name in re.findall(r"--output_dir (\S+)", text)}) == 2
