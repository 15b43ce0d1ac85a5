"""Child processes that are copies of this one: they begin with all that it has imported."""

import faulthandler
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "copy"  # of such a process, whose command line is that of the tests


def no_limit() -> None:
    """Out of a test."""


arm: Callable[[], None] = no_limit  # sets the limit of time of the test that runs, see conftest.py


class Copy(subprocess.Popen):
    """`Popen` of `python -c CODE ...`, `python -m MODULE ...` or `python FILE ...` without a fresh interpreter, which
    takes 0.1 s, or 4 s with torch and transformers.

    The child has the variables, the folder, the session and the files that `Popen` gives it, default signals and no
    thread. The seed of hashes is this process's, and so is its memory, which a limit would count.
    """

    def _execute_child(self, args: Sequence[str], *options: Any) -> None:
        _, _, _, passed, folder, env, _, _, _, stdin, _, _, stdout, _, stderr, *_, session, _ = options
        ready, begun = os.pipe()
        faulthandler.cancel_dump_traceback_later()  # it has a thread, for which a copy would wait for ever
        self.pid = os.fork()
        if self.pid == 0:
            _be(args[1:], {0: int(stdin), 1: int(stdout), 2: int(stderr)}, passed, folder, env, session)
        arm()
        self._child_created = True
        self._close_pipe_fds(*options[9:15])
        os.close(begun)
        os.read(ready, 1)  # until the copy has its session and has let go of all files
        os.close(ready)


def _be(words: Sequence[str], ends: dict[int, int], passed: Collection[int], folder: Any, env: Any, session: bool):
    try:
        if session:
            os.setsid()
        if folder is not None:
            os.chdir(folder)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _let_go(ends, passed)
        _forget_ranks()
        faulthandler.enable(2)
        Path("/proc/self/comm").write_text(NAME)
        _run([str(word) for word in words])
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _let_go(ends: dict[int, int], passed: Collection[int]) -> None:
    """The numbers of open files stay in use, by nothing: objects that believe to hold them close them some day."""
    for fd, end in ends.items():
        if end >= 0:
            os.dup2(end, fd)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in (0, 1, 2, nothing, *passed) and os.path.exists(f"/proc/self/fd/{fd}"):
            os.dup2(nothing, fd, inheritable=False)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, encoding="utf-8", closefd=False) for fd in (1, 2))


def _forget_ranks() -> None:
    """A test before may have been alone in this process, and the copy may be one of several."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def _run(words: list[str]) -> None:
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):
        del words[0]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(f"{words[1]}.__main__", None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(words[0])]
        runpy.run_path(words[0], run_name="__main__")


WITH_COPIES = SimpleNamespace(**vars(subprocess) | {"Popen": Copy})  # in place of a module's `subprocess`


def _of_rewards(command: Sequence[str], **given: Any) -> subprocess.Popen:
    is_limited = command[-1] != "0"  # in memory, of which this process holds much
    return (subprocess.Popen if is_limited or sys.platform != "linux" else Copy)(command, **given)


OF_REWARDS = SimpleNamespace(
    **vars(subprocess) | {"Popen": _of_rewards}
)  # in place of `rewards.isolation.pool.subprocess`
