"""What a killed run leaves of its Ray cluster is removed by the next one, and a stopped raylet holds nobody."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from rollout.faults import Faults, RolloutError
from rollout.workers.cluster import Cluster, Seclusion


@pytest.fixture
def ray_process(monkeypatch):
    """A Cluster whose raylet is a process that only sleeps."""
    monkeypatch.setattr("rollout.workers.cluster.STOPPED_S", 0.5)
    monkeypatch.setattr("rollout.workers.cluster.LEAVE_S", 2.0)
    with subprocess.Popen(["sleep", "600"]) as sleeps:
        process = psutil.Process(sleeps.pid)
        monkeypatch.setattr("rollout.workers.cluster._vital_processes", lambda: {"raylet": process})
        monkeypatch.setattr("rollout.workers.cluster.start_ray", lambda *_: None)
        yield process
        sleeps.kill()


def stop(process: psutil.Process) -> None:
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)


def test_a_raylet_that_is_stopped_for_a_moment_is_waited_for(ray_process, monkeypatch):
    monkeypatch.setattr("rollout.workers.cluster.STOPPED_S", 60.0)
    cluster = Cluster(1)
    stop(ray_process)
    goes_on = threading.Timer(0.5, ray_process.resume)
    goes_on.start()
    cluster.check()
    goes_on.join()
    assert ray_process.is_running()
    cluster._closed.set()


def test_a_raylet_that_stays_stopped_is_killed_and_named(ray_process):
    """The thread does it: a call of Ray's that waits for the raylet never comes back to `check`."""
    cluster = Cluster(1)
    stop(ray_process)
    deadline = time.monotonic() + 120
    while ray_process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(RolloutError, match=rf"Ray's raylet \(process {ray_process.pid}\) has died, and.*--resume auto"):
        cluster.check()
    cluster._closed.set()


def test_a_raylet_of_somebody_else_that_stays_stopped_is_named_and_lives(ray_process, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("rollout.workers.cluster.LEAVE_S", 0.2)
    cluster = Cluster(1)
    stop(ray_process)
    with pytest.raises(RolloutError, match=rf"Ray's raylet \(process {ray_process.pid}\) has died or was stopped, and"):
        cluster.check()
    assert ray_process.status() == psutil.STATUS_STOPPED


def test_what_the_gcs_server_does_not_answer_is_an_error_after_a_while(ray_process, monkeypatch):
    """It may be on another machine, where nobody sees that it was stopped."""
    cluster, hangs = Cluster(1), threading.Event()
    assert cluster.ask(pow, 2, 5) == 32
    with pytest.raises(ZeroDivisionError):
        cluster.ask(divmod, 1, 0)

    def nodes() -> None:
        hangs.wait(60)

    monkeypatch.setattr("rollout.workers.cluster.ASK_S", 0.5)
    with pytest.raises(RolloutError, match="gcs_server has not answered nodes for 0.5 s.*--resume auto"):
        cluster.ask(nodes)
    ray_process.kill()
    with pytest.raises(RolloutError, match="Ray's raylet .* has died"):
        cluster.ask(nodes)
    hangs.set()
    cluster._closed.set()


class FullStore:
    """Ray, whose object store has room at the third time of asking, or never."""

    exceptions = ray.exceptions

    def __init__(self, full: float) -> None:
        self.full = full

    def put(self, value: str) -> str:
        self.full -= 1
        if self.full >= 0:
            raise ray.exceptions.OutOfDiskError("no room")
        return f"reference to {value}"


def test_a_full_object_store_is_waited_for_counted_once_and_named_if_it_stays_full(ray_process):
    told, waited = [], []
    cluster, faults = Cluster(1), Faults(lambda *what: told.append(what))
    cluster.ray = FullStore(2)
    assert cluster.put("weights", faults, 60.0, lambda: waited.append(1)) == "reference to weights"
    assert (told, len(waited)) == ([("the object store", "it is full", "it is waited for")], 2)
    counted = faults.metrics()
    assert (counted["faults/object_store"], counted["faults/sampling_seconds"] > 0.3) == (1, True)
    cluster.ray = FullStore(float("inf"))
    with pytest.raises(RolloutError, match="object store on this machine was full for 0.3 s"):
        cluster.put("weights", Faults(), 0.3, lambda: None)
    cluster._closed.set()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_a_gcs_server_under_sigstop_holds_no_question(monkeypatch):
    """The real one, which nobody watches here, as that of a cluster on other machines."""
    monkeypatch.setattr("rollout.workers.cluster.ASK_S", 2.0)
    cluster = Cluster(1)
    gcs = cluster.processes.pop("gcs_server")
    try:
        assert cluster.ask(ray.cluster_resources)["CPU"] == 1
        stop(gcs)
        for question in (ray.cluster_resources, ray.nodes, ray.available_resources):
            with pytest.raises(RolloutError, match=f"has not answered {question.__name__} for 2 s"):
                cluster.ask(question)
    finally:
        gcs.resume()
        cluster.close()


OTHER = """
import rollout.workers.cluster
import os, signal, subprocess, sys
rollout.workers.cluster.LONGEST_FOLDER = 200
from rollout.workers.cluster import Seclusion
seclusion = Seclusion()
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"])
print(seclusion.folder, child.pid, flush=True)
if sys.stdin.readline().strip() == "alone":
    seclusion._watcher.kill()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")
@pytest.mark.parametrize("how", ["watched", "alone"])
def test_the_folder_and_processes_of_a_killed_run_are_removed_and_those_of_a_living_one_stay(
    tmp_path, monkeypatch, how
):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("rollout.workers.cluster.LONGEST_FOLDER", 200)
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=-1, stdout=-1, text=True) as other:
        words = {*other.stdout.readline().split(), *other.stdout.readline().split()} - {"up"}
        [pid] = [word for word in words if word.isdigit()]
        [folder] = map(Path, words - {pid})
        Seclusion().end()
        assert (folder / "token").exists()  # it lives
        assert psutil.pid_exists(int(pid))
        other.stdin.write(f"{how}\n")
    end = time.monotonic() + 30
    while how == "watched" and folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert folder.exists() == (how == "alone")
    seclusion = Seclusion()
    assert not folder.exists()
    assert psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=10)[1] == []
    seclusion.end()
    assert list(tmp_path.iterdir()) == []
