"""What belongs to a folder goes with the process that has made it, however that ends, and nothing else does."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from policies.files import abandoned

OWNER = """
import os, subprocess, sys
watched, module = sys.argv[1:]
os.mkdir(watched)
token = {"RAY_AUTH_TOKEN_PATH": watched + "/token"}
sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
watcher = subprocess.Popen([sys.executable, "-P", module, watched], stdin=subprocess.PIPE, start_new_session=True)
children = [subprocess.Popen(sleeps, env=os.environ | token), subprocess.Popen([*sleeps, watched + "/socket"])]
print(*(child.pid for child in children), flush=True)
sys.stdin.read()
watcher.communicate()
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)],
)
def test_the_folder_and_its_processes_end_with_their_owner(tmp_path, number):
    folder = tmp_path / "quartet-1"
    stranger = subprocess.Popen(
        ["sleep", "600"], env=os.environ | {"RAY_AUTH_TOKEN_PATH": f"{tmp_path}/quartet-2/token"}
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), abandoned.__file__], stdin=-1, stdout=-1, stderr=-3
    )
    try:
        children = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        owner.send_signal(number) if number else owner.stdin.close()
        assert psutil.wait_procs(children, timeout=30)[1] == []
        end = time.monotonic() + 30
        while folder.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert not folder.exists()
        assert stranger.poll() is None
    finally:
        for process in (stranger, owner):
            process.kill()
            process.wait()


def test_a_folder_whose_lock_is_taken_stays(tmp_path):
    for name in ("quartet-living", "quartet-left", "other-left"):
        (tmp_path / name).mkdir()
        (tmp_path / name / abandoned.LOCK).touch()
    holds = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    lock = str(tmp_path / "quartet-living" / abandoned.LOCK)
    with subprocess.Popen([sys.executable, "-c", holds, lock], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        abandoned.remove_abandoned(tmp_path, "quartet-")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other-left", "quartet-living"]
        process.stdin.close()
