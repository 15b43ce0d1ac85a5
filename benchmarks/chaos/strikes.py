"""What is done to a run, and when: the plan of a seed, the moment that is waited for, the blow."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

from benchmarks.chaos.run import TITLES, Watched, alive, title
from rollout.workers.cluster import Seclusion

MOMENT_S = 300.0  # in which every moment comes again
MOMENTS = ("idle", "sampling", "publishing", "saving")
# By what is struck: how, and how often among others. What of Ray dies alone ends the run, which is then resumed.
OWN_CLUSTER = {
    ("worker", "SIGKILL"): 3,
    ("worker", "SIGSTOP"): 4,
    ("reward worker", "SIGKILL"): 2,
    ("reward worker", "SIGSTOP"): 2,
    ("run", "SIGKILL"): 1,
    ("run", "SIGTERM"): 2,
    ("raylet", "SIGKILL"): 1,
    ("raylet", "SIGSTOP"): 1,
    ("gcs_server", "SIGKILL"): 1,
    ("ray::DashboardAgent", "SIGKILL"): 1,
    ("ray::RuntimeEnvAgent", "SIGKILL"): 1,
}
SHARED_CLUSTER = {
    ("node", "removed"): 4,
    ("object store", "full"): 3,
    ("worker", "SIGKILL"): 1,
    ("worker", "SIGSTOP"): 2,
    ("run", "SIGKILL"): 1,
    ("run", "SIGTERM"): 1,
}


@dataclass(frozen=True)
class Strike:
    """`what` is struck by `how` in the first `moment` of that kind.

    >>> Strike.read("reward worker, SIGSTOP, saving")
    Strike(what="reward worker", how="SIGSTOP", moment="saving")
    """

    what: str
    how: str
    moment: str

    @classmethod
    def read(cls, words: str) -> Strike:
        """Raises ValueError where there is no such strike."""
        what, how, moment = (word.strip() for word in words.split(","))
        if (what, how) not in OWN_CLUSTER | SHARED_CLUSTER or moment not in (*MOMENTS, "measuring"):
            raise ValueError(words)
        return cls(what, how, moment)


def plan(seed: int, count: int, choices: dict[tuple[str, str], int], *, measures: bool) -> list[Strike]:
    """Drawn as from a pack of cards, in which each kind of strike is as often as `choices` says: no kind is missed for
    long. Where the run `measures` costs, a worker is struck while it does so first."""
    chance = random.Random(seed)
    found = [Strike("worker", chance.choice(["SIGKILL", "SIGSTOP"]), "measuring")] if measures else []
    while len(found) < count:
        pack = [kind for kind, often in choices.items() for _ in range(often)]
        chance.shuffle(pack)
        found += [Strike(what, how, chance.choice(MOMENTS)) for what, how in pack[: count - len(found)]]
    return found


def wait_for(run: Watched, moment: str) -> psutil.Process | None:
    """The worker that is in this moment, or any where it is the run that is; None where the run has ended before."""
    deadline, looked, workers = time.monotonic() + MOMENT_S, 0.0, list[psutil.Process]()
    while run.process.poll() is None and time.monotonic() < deadline:
        if time.monotonic() > looked + 0.3:
            alive_now = [p for p in run.look() if p.create_time() > run.began]  # and not of before it was killed
            workers = [p for p in alive_now if title(p)[:1] and title(p)[0].startswith("ray::Worker")]
            learns, looked = run.step > 0, time.monotonic()
        for worker in workers:
            [told] = title(worker)[:1] or [""]
            if moment == "saving":
                if run.saving:
                    return worker
            elif (moment == "idle" and told == "ray::Worker" and learns) or TITLES.get(moment, "?") in told:
                return worker
        time.sleep(0.001)
    return None


def strike(run: Watched, blow: Strike, worker: psutil.Process) -> str:
    """Returns what was struck; empty where there is no such process."""
    number = getattr(signal, blow.how)
    if blow.what == "run":
        run.look()
        run.process.send_signal(number)
        return f"process {run.process.pid}"
    if blow.what == "worker":
        victim = worker
    else:
        marks = {"reward worker": "rewards.isolation.child"}
        mark = marks.get(blow.what, blow.what)
        found = [p for p in run.look() if alive(p) and any(mark in word for word in title(p)[:5])]
        if not found:
            return ""
        victim = found[0]
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(number)
        return f"process {victim.pid}"
    return ""


class SharedCluster:
    """A cluster of three simulated nodes that a run is led to by RAY_ADDRESS, with a small object store."""

    STORE = 100 << 20  # bytes; Ray takes no less than 75 MiB

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= self.environment
        Seclusion._tell_ray()
        settings = {"automatic_object_spilling_enabled": False, "local_fs_capacity_threshold": 0.0}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": self.STORE, "_system_config": settings},
        )
        self.environment["RAY_ADDRESS"] = self.cluster.address
        self.nodes = [self._add(), self._add()]
        self.filler: subprocess.Popen | None = None

    def _add(self):
        return self.cluster.add_node(num_cpus=1, object_store_memory=self.STORE)

    def remove(self) -> str:
        """A node other than the driver's goes, and another one comes."""
        node = self.nodes.pop(0)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self._add())
        return f"node {node.node_id[:8]}"

    def fill(self, seconds: float) -> str:
        """The driver's node, by another driver, for so long."""
        words = ["-c", FILLER, self.cluster.address, str(seconds)]
        self.filler = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
        assert self.filler.stdout is not None
        return self.filler.stdout.readline().strip()

    def close(self) -> None:
        if self.filler:
            self.filler.kill()
            self.filler.wait()
        self.cluster.shutdown()
        for name in self.environment.keys() & os.environ.keys():
            del os.environ[name]
        Seclusion._tell_ray()


FILLER = """
import sys, time, numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
held = []
for size in (8 << 20, 1 << 20, 1 << 18):
    try:
        while True:
            held.append(ray.put(numpy.ones(size, numpy.uint8)))
    except ray.exceptions.RayError as error:
        why = type(error).__name__
print(f"{len(held)} objects, then {why}", flush=True)
time.sleep(float(sys.argv[2]))
"""
