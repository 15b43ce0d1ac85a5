"""Ends a process at a chosen change to the disk."""

import os
import signal
from collections.abc import Callable

from policies import tensor_files


def kills_itself(action: Callable[[], object], call: int) -> bool:
    """Runs `action` in a process that kills itself just before its `call`-th change to the disk. False when it ended
    before that."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        calls = 0

        def deadly(function):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        try:
            for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
                setattr(os, name, deadly(getattr(os, name)))
            tensor_files.save_file = deadly(tensor_files.save_file)
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
