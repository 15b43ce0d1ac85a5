"""What a killed run leaves of its Ray cluster is removed by the next one."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rollout.cluster import Seclusion

OTHER = """
import rollout.cluster
import os, signal, subprocess, sys
rollout.cluster.LONGEST_FOLDER = 200
from rollout.cluster import Seclusion
seclusion = Seclusion()
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"])
print(seclusion.folder, child.pid, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")
def test_the_folder_and_processes_of_a_killed_run_are_removed_and_those_of_a_living_one_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("rollout.cluster.LONGEST_FOLDER", 200)
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=-1, stdout=-1, text=True) as other:
        words = {*other.stdout.readline().split(), *other.stdout.readline().split()} - {"up"}
        [pid] = [word for word in words if word.isdigit()]
        [folder] = map(Path, words - {pid})
        Seclusion().end()
        assert (folder / "token").exists()  # it lives
        assert psutil.pid_exists(int(pid))
        other.stdin.write("\n")
    seclusion = Seclusion()
    assert not folder.exists()
    assert psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=10)[1] == []
    seclusion.end()
    assert list(tmp_path.iterdir()) == []
