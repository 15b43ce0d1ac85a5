"""Windows and macOS, as far as Linux can play them: what they lack is taken away, then everything of ours is imported.

    python other_systems.py FOLDER

The libraries that we use are loaded before, since they have their own ways on each system.
"""

from __future__ import annotations

import ast
import fcntl
import importlib
import mmap
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType

import pytest

OURS = ("policies", "rollout", "rewards", "review", "grpo")
LINUX_ALONE = {
    os: "sched_getaffinity sched_setaffinity memfd_create pidfd_open eventfd posix_fadvise posix_fallocate setns",
    select: "epoll",
    signal: "sigtimedwait sigwaitinfo SIGPWR SIGSTKFLT SIGPOLL SIGRTMIN SIGRTMAX",
}
POSIX_ALONE = {
    os: "fork forkpty killpg getpgid getpgrp setpgid getsid setsid getuid geteuid getgid getegid setuid setgid pread "
    "pwrite mkfifo openpty posix_spawn posix_spawnp wait wait3 wait4 waitid chown fchown lchown getloadavg nice",
    select: "poll",
    signal: "SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGQUIT SIGPIPE SIGSTOP SIGCONT SIGTSTP SIGSYS SIGXCPU "
    "SIGXFSZ setitimer getitimer alarm pause pthread_sigmask pthread_kill sigwait siginterrupt ITIMER_REAL",
    socket: "AF_UNIX send_fds recv_fds",
    mmap: "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS MAP_ANON PROT_READ PROT_WRITE",
}
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
ROOT = Path(__file__).parents[2]
SOURCES = [file for package in OURS for file in sorted((ROOT / package).rglob("*.py")) if file.parent.name != "inside"]


def load_libraries() -> None:
    names = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    for name in sorted(name for name in names if name.partition(".")[0] not in OURS):
        with suppress(ImportError, RuntimeError):  # an extra that is not installed
            importlib.import_module(name)


def import_ours() -> int:
    for file in SOURCES:
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        importlib.import_module(module.removesuffix(".__init__"))
    return len(SOURCES)


def become(system: str) -> None:
    gone = [LINUX_ALONE] if system == "darwin" else [LINUX_ALONE, POSIX_ALONE]
    for module, names in [item for group in gone for item in group.items()]:
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    if system == "win32":
        sys.modules |= dict.fromkeys(POSIX_MODULES)  # None: importing them fails
        sys.modules["msvcrt"] = _msvcrt()
    _hide("/proc", "/sys")
    sys.platform = system


def _msvcrt() -> ModuleType:
    module = ModuleType("msvcrt")
    module.LK_NBLCK = 2
    module.locking = lambda descriptor, mode, count: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return module


def _hide(*folders: str) -> None:
    """From our own code: psutil reads them on Linux, and something else elsewhere."""
    library, stat = str(Path(os.__file__).parent), os.stat

    def refuse(path: object) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(folders):
            return
        frame = sys._getframe(2)
        while frame.f_back and frame.f_code.co_filename.startswith((library, "<")):
            frame = frame.f_back
        caller = frame.f_code.co_filename
        if caller.startswith(str(ROOT)) and "-packages" not in caller:
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))

    def hidden_stat(path, *args, **kwargs):
        refuse(path)
        return stat(path, *args, **kwargs)

    os.stat = hidden_stat
    sys.addaudithook(lambda event, args: refuse(args[0]) if event == "open" else None)


def lock_a_folder(folder: Path) -> None:
    from grpo.run.lock import FolderInUse, RunLock

    with RunLock(folder) as lock:
        lock.lock_folder()
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on host"):
            RunLock(folder)
    RunLock(folder).release()


def write_files(folder: Path) -> None:
    from grpo.run.json_lines import append_line, open_lines
    from policies.files.atomic import write_file, write_folder

    with write_folder(folder / "policy") as partial:
        partial.mkdir()
        write_file(partial / "config.json", "{}")
    assert (folder / "policy/config.json").read_text() == "{}"
    (folder / "lines").write_text('{"a": 1}\n{"b"')
    with open_lines(folder / "lines") as stream:
        append_line(stream, {"c": 3})
    assert (folder / "lines").read_text() == '{"a": 1}\n{"c": 3}\n'


def stop_a_run() -> None:
    from grpo.run.stop import SIGNALS, signals

    assert signal.SIGINT in SIGNALS
    came: list[int] = []
    with signals.heard(came.append):
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]


def score(system: str) -> None:
    from rewards import RewardError, RewardSpec, Scorer
    from rewards.isolation.pool import WorkerPool
    from rewards.isolation.sandbox import unavailable

    with Scorer([RewardSpec("gsm8k")], columns=["answer"]) as scorer:
        [group] = scorer.score(["6 * 7 = "], [["#### 42", "41"]], [{"answer": "#### 42"}], prompt_ids=["a"])
    assert group.rewards == [1.0, 0.0], group
    assert "Linux's namespaces" in str(unavailable())
    refused = pytest.raises(RewardError, match="WSL 2") if system == "win32" else nullcontext()
    with refused:
        WorkerPool([], size=1, timeout_s=1.0).close()


def train_a_step(folder: Path) -> None:
    from grpo import TrainConfig, train
    from grpo.cli.commands.eval import peak_memory_gib

    def short(completions, **columns):
        return [-float(len(text)) for text in completions]

    rollout = {"max_completion_tokens": 8, "group_size": 2, "draft_tokens": 0}
    options = {"model": "tiny", "steps": 1, "prompts_per_step": 1, "threads": 1, "rollout": rollout}
    options |= {"eval": {"limit": 1}}
    result = train(TrainConfig(output_dir=folder / "run", log={"trackers": []}, **options), reward=short)
    assert result.metrics[-1]["reward/mean"] <= 0
    assert sys.platform == "win32" or peak_memory_gib()["rss"] > 0


def play(system: str, folder: Path) -> None:
    become(system)
    modules = import_ours()
    lock_a_folder(folder / "locked")
    write_files(folder)
    stop_a_run()
    score(system)
    train_a_step(folder)
    print(f"{system}: {modules} modules", flush=True)


def main(folder: Path) -> int:
    """How many systems did not do it all."""
    load_libraries()
    codes = []
    for system in ("win32", "darwin"):
        if (child := os.fork()) == 0:
            try:
                (folder / system).mkdir()
                play(system, folder / system)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        codes.append(os.waitpid(child, 0)[1])
    return sum(map(bool, codes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
