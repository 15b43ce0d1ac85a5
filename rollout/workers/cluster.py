"""The Ray cluster of a pool, its own on loopback or an existing one, and a check whether it is still alive.

Every user of a machine can reach loopback, and whoever can talk to Ray can run code in it. So a cluster of our own
requires a token. The token is in a folder that only its own user may read, like all other files of that cluster.

If its raylet has died, Ray ends a driver without an exception when the driver next uses shared memory. So a pool calls
`Cluster.check` before each such use, and keeps nothing in shared memory between its calls.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil

from policies.files import abandoned
from rollout.faults import Faults, RolloutError
from rollout.places import refuse_open, visible_gpus

GCS_TIMEOUT_S = 24 * 3600  # Ray's own 60 s end a process while it learns, before `check` can name the reason
LONGEST_FOLDER = 21  # letters: paths of Ray's sockets begin with it, and systems allow them 103 to 107
STOPPED_S = 30.0  # how long a process of Ray's may be stopped before it counts as dead
ASK_S = 60.0  # how long the gcs_server of a cluster may take to answer
POLL_S, LEAVE_S = 0.2, 5.0  # the second: how long the processes of a cluster that was shut down may take to end
T = TypeVar("T")


class Cluster:
    """The cluster that this process is connected to; with `address` or RAY_ADDRESS it is the user's.

    If this process is connected already, that cluster is used as it is and stays when the pool closes.
    """

    def __init__(self, cpus: int, address: str | None = None, hidden_gpus: int = 0) -> None:
        import ray

        self.ray = ray
        self.owned = not ray.is_initialized()
        if self.owned:
            start_ray(cpus, address, hidden_gpus)
        self.processes = _vital_processes()
        self._closed = threading.Event()
        if self.owned:
            threading.Thread(target=self._watch, daemon=True, name="ray").start()

    def _watch(self) -> None:
        """A call of Ray's that waits for a process under SIGSTOP can only be ended from outside. Looks are counted, and
        not seconds: with Ctrl-Z this process stops as well."""
        seen: dict[int, int] = defaultdict(int)
        while not self._closed.wait(POLL_S):
            for process in self.processes.values():
                seen[process.pid] = seen[process.pid] + 1 if _stopped(process) else 0
                if seen[process.pid] * POLL_S > STOPPED_S:
                    with suppress(psutil.Error):
                        process.kill()

    def check(self, *, ask: bool = False) -> None:
        """Raises RolloutError when Ray has died. With `ask` its own records are read as well: they show that a raylet
        is about to end, a moment before its process has. Under SIGSTOP it has half a minute to go on."""
        for _ in range(round((STOPPED_S + LEAVE_S) / POLL_S)):
            if not (hung := [name for name, process in self.processes.items() if _stopped(process)]):
                break
            time.sleep(POLL_S)
        dead = [
            f"{name} (process {process.pid})"
            for name, process in self.processes.items()
            if name in hung or not _lives(process)
        ]
        if ask and not dead:
            here = self.ray.get_runtime_context().get_node_id()
            if not any(node["NodeID"] == here and node["Alive"] for node in self.ask(self.ray.nodes)):
                dead = ["raylet on this machine, or one of its agents,"]
        if dead:
            how = "has died or was stopped" if hung else "has died"
            raise RolloutError(
                f"Ray's {dead[0]} {how}, and with it all rollout workers. If memory ran out, lower rollout.workers "
                "or rollout.prompts_per_shard; go on with --resume auto"
            )

    def ask(self, call: Callable[..., T], *arguments: object) -> T:
        """Makes a `call` of Ray's that the cluster's gcs_server has to answer: such calls know no time limit. Raises
        RolloutError where that has died, or has not answered for ASK_S seconds; the call is left in a thread.

        >>> cluster.ask(ray.cluster_resources)
        {"CPU": 4.0, "node:127.0.0.1": 1.0}
        """
        answer = Future[T]()

        def act() -> None:
            try:
                answer.set_result(call(*arguments))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=act, daemon=True, name="ray call").start()
        deadline = time.monotonic() + ASK_S
        while not wait([answer], POLL_S).done:
            self.check()
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"Ray's gcs_server has not answered {getattr(call, '__name__', 'a question')} for {ASK_S:g} s: it "
                    "hangs, or the network to it. Start the cluster again, and go on with --resume auto"
                )
        return answer.result()

    def put(self, value: object, faults: Faults, limit_s: float, while_waiting: Callable[[], None]) -> object:
        """A reference to `value` in shared memory. A full one is waited for: RolloutError after `limit_s` seconds."""
        errors, began, waits = self.ray.exceptions, time.monotonic(), False
        while True:
            self.check()
            try:
                reference = self.ray.put(value)
            except (errors.ObjectStoreFullError, errors.OutOfDiskError):
                if time.monotonic() > began + limit_s:
                    raise RolloutError(
                        f"Ray's object store on this machine was full for {limit_s:g} s, and "
                        "weights have no room in it: end what fills it, or start the cluster with a larger "
                        "--object-store-memory; go on with --resume auto"
                    ) from None
                if not waits:
                    store = "the object store", "it is full"
                    faults.lost("object_store", *store, work="put", since=began, action="it is waited for")
                waits = True
                while_waiting()
                time.sleep(POLL_S)
            else:
                faults.done("put")
                return reference

    def close(self) -> None:
        """Shut down what was started for this pool. A worker under SIGSTOP does not end, so it is killed."""
        self._closed.set()
        if not self.owned:
            return
        raylet = self.processes.get("raylet")
        workers = raylet.children(recursive=True) if raylet and _lives(raylet) else []
        stop_ray()
        for worker in psutil.wait_procs(workers, timeout=LEAVE_S)[1]:
            with suppress(psutil.NoSuchProcess):
                worker.kill()


def _vital_processes() -> dict[str, psutil.Process]:
    """The processes without which Ray ends, by name: the raylet of this process, and the gcs_server of its cluster if
    that runs on this machine."""
    import ray

    node = ray._private.worker._global_node
    marks = {"raylet": f"={node.raylet_socket_name}", "gcs_server": node.session_name}
    return {
        process.info["name"]: process
        for process in psutil.process_iter(["name", "cmdline"])
        if (mark := marks.get(process.info["name"]))
        and any(word.endswith(mark) for word in process.info["cmdline"] or ())
    }


def _status(process: psutil.Process) -> str | None:
    try:
        return process.status() if process.is_running() else None
    except psutil.NoSuchProcess:
        return None


def _lives(process: psutil.Process) -> bool:
    return _status(process) not in (None, psutil.STATUS_ZOMBIE)


def _stopped(process: psutil.Process) -> bool:
    return _status(process) == psutil.STATUS_STOPPED


class Seclusion:
    """A private folder for Ray's files, with a token without which this cluster refuses every request.

    Ray and the processes that it starts find the token through environment variables, which `end` restores. A small
    process, in a session of its own, kills what still runs and removes the folder when `end` is called or this process
    is gone. If it was killed too, the next run does so first.
    """

    VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

    def __init__(self) -> None:
        place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
        if os.name == "posix" and len(place) > LONGEST_FOLDER:
            place = "/tmp"
        abandoned.remove_abandoned(Path(place), "quartet-")
        self.folder = Path(tempfile.mkdtemp(prefix="quartet-", dir=place))  # 0700
        self._watcher = subprocess.Popen(
            [sys.executable, "-P", abandoned.__file__, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._lock = open(self.folder / "new", "w")  # noqa: SIM115 - held as long as this process lives
        abandoned.take_lock(self._lock)  # from now on it is not
        os.rename(self.folder / "new", self.folder / abandoned.LOCK)
        path = self.folder / abandoned.TOKEN
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        self._before = {name: os.environ.pop(name, None) for name in self.VARIABLES}
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        self._tell_ray()

    def end(self) -> None:
        """Call it after Ray was shut down. What of Ray still runs is killed."""
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._tell_ray()
        self._watcher.communicate()  # it removes the folder once its input ends
        if self.folder.exists():  # somebody has killed it
            abandoned.remove(self.folder)
        self._lock.close()

    @staticmethod
    def _tell_ray() -> None:
        """Make Ray read the variables again: it has read them at its import, and keeps a token that it has read."""
        import ray

        raylet: Any = ray._raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


_seclusion: Seclusion | None = None  # of the cluster that this process has started; Ray allows one for each process


@contextmanager
def _without_handlers() -> Iterator[None]:
    """Inside it Ray installs none of its two handlers of SIGTERM where there is one already: the one in Python would
    come first, and at the end one in C++, unseen by Python, which leaves none when Ray is shut down."""
    import ray

    handler: Any = signal.getsignal(signal.SIGTERM)
    if not callable(handler):
        yield
        return
    utils, constants = cast(Any, ray._private.utils), cast(Any, ray._private.ray_constants)
    usual, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    off = getattr(constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", False)
    constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    try:
        yield
    finally:
        utils.set_sigterm_handler = usual
        constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = off
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, handler)  # Ray 2.52 does not know that constant


def _silence_remarks() -> None:
    """Ray prints a paragraph for every process that dies, beside the line in which a run says what it does about it.
    What actors themselves print is still shown."""
    import ray

    module: Any = ray._private.worker
    show = module.print_to_stdstream
    if getattr(show, "without_remarks", False):
        return

    def without_remarks(data: dict[str, Any], *arguments: object, **named: object) -> None:
        if data.get("pid") != "raylet":
            show(data, *arguments, **named)

    without_remarks.without_remarks = True  # type: ignore[attr-defined]
    module.print_to_stdstream = without_remarks


def stop_ray() -> None:
    """Disconnect, and remove everything of a cluster that `start_ray` has started."""
    global _seclusion
    import ray

    ray.shutdown()
    if _seclusion:
        _seclusion.end()
        _seclusion = None


@_without_handlers()
def start_ray(cpus: int, address: str | None = None, hidden_gpus: int = 0) -> None:
    """Start a cluster of our own on loopback, without dashboard and usage reports, or connect to an existing one by its
    address, with the user's own settings. A cluster of our own has no use of the first `hidden_gpus` of this machine.
    A handler of SIGTERM that the caller has stays.
    """
    global _seclusion
    import ray

    _silence_remarks()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        refuse_open(address)
        ray.init(address=address, logging_level=logging.WARNING)
        return
    stop_ray()  # if the caller has ended a former cluster by ray.shutdown() alone, its folder is still there
    atexit.unregister(stop_ray)
    atexit.register(stop_ray)  # it runs before Ray's own, which would leave the folder
    _seclusion = Seclusion()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(hidden_gpus)
    # Ray reads 127.0.0.1 as "find my address" and then listens on every interface, except where it supports no
    # clusters at all, as on Windows: there it binds all its processes to loopback.
    constants = ray._private.ray_constants
    clusters, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=True,
            configure_logging=True,
            _temp_dir=str(_seclusion.folder / "ray"),  # Ray opens it to all users, so it is in a closed one
            _system_config={
                "gcs_rpc_server_reconnect_timeout_s": GCS_TIMEOUT_S,
                "worker_niceness": 0,  # with Ray's own 15 any other busy process takes nearly all of the time
            },
        )
    except Exception as error:  # Ray raises nothing narrower when processes do not start in time
        stop_ray()
        raise RolloutError(
            f"Ray did not start: {error} Try again with less other work on this machine, or use rollout.workers=0, "
            "which needs no Ray"
        ) from error
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        if hidden_gpus:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            os.environ |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
