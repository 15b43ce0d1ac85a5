"""The files that the user's code opens: rewards, agents, environments, tools and losses, in all processes of a run.

Python tells an audit hook of every file that it opens. The processes of a run append what they see to one list, which
they find by an environment variable. What a library in C or another program opens is not seen, nor are databases.

A file that is newer than the list is read at once, for its checksum: it may change again before the run looks at the
list. An older one is left to the run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import site
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from rewards.digests import file_digest

VARIABLE = "QUARTET_OPENED"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
OF_THE_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/run", "/usr/share")
OURS = ("rewards", "review", "rollout", "policies", "grpo")  # packages, next to this one in a copy of the repository

_thread = threading.local()
_process = ""  # whose code runs in this process: a worker's, also in threads that the code starts
_list = ""  # the path of the list; the user's code may have changed the environment variable
_is_hooked = False
_since = 0  # when the list was made, in nanoseconds of the file system's clock
_seen: set[tuple[str, str, str, bool, int]] = set()  # list, function, path, whether it was written, and its time if new


class Opened(NamedTuple):
    """A file that a function has opened: its absolute path, whether it may have written into it, and its checksum when
    it was opened if it is newer than the list."""

    function: str
    path: str
    written: bool
    checksum: str | None = None


class OpenedFiles:
    """The list of a run. `since` is its beginning, in nanoseconds of the file system's clock."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path, self.since = path, path.stat().st_mtime_ns
        self._read = 0

    def new(self) -> list[Opened]:
        """Return the files that were added to the list since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            lines = [line for line in file if line.endswith(b"\n")]
        self._read += sum(map(len, lines))
        return [Opened(*json.loads(line)) for line in lines]


@contextmanager
def listing() -> Iterator[OpenedFiles]:
    """This process and those that it starts list what the user's code opens in them."""
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory(prefix="quartet-opened-") as folder:
        files = OpenedFiles(Path(folder) / "opened.jsonl")
        os.environ[VARIABLE] = str(files.path)
        begin_process()
        try:
            yield files
        finally:
            if before is None:
                os.environ.pop(VARIABLE, None)
            else:
                os.environ[VARIABLE] = before
            begin_process()


@contextmanager
def opened_by(function: str) -> Iterator[None]:
    """What this thread opens inside is opened by `function`, as the configuration names it."""
    before, _thread.function = getattr(_thread, "function", ""), function
    try:
        yield
    finally:
        _thread.function = before


def begin_process() -> None:
    """Add the files that this process opens to the list that its environment names, if it names one."""
    global _is_hooked, _list, _since
    _list = os.environ.get(VARIABLE, "")
    with suppress(OSError):  # the folder of the list has the time at which it was made: nothing else is put into it
        _since = os.stat(os.path.dirname(_list)).st_mtime_ns if _list else 0
    if _list and not _is_hooked:
        sys.addaudithook(_see)  # Python has no way to take it away
        _is_hooked = True


def this_process_is_of(function: str) -> None:
    """From now on the user's code that runs here is `function`'s, in every thread."""
    global _process
    _process = function


def is_installed(path: str) -> bool:
    """Whether a file belongs to Python, to a package that is installed, to quartet or to the system."""
    return path.startswith(_INSTALLED)


def _folders() -> tuple[str, ...]:
    named = sysconfig.get_paths()
    folders = [named[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), *OF_THE_SYSTEM]
    folders += [str(Path(__file__).parents[1] / name) for name in OURS]
    both = {folder for each in folders for folder in (each, os.path.realpath(each))}
    return tuple(folder + os.sep for folder in both)


_INSTALLED = _folders()
_HIDDEN = os.path.expanduser("~/.")  # ~/.cache, ~/.netrc: what libraries keep there


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("open", "import"):
        return
    function = getattr(_thread, "function", "") or _process
    if not (function and _list) or getattr(_thread, "reads", False):
        return
    with suppress(Exception):  # the user's code opens its file all the same
        path, written = (arguments[0], arguments[2] & WRITES) if event == "open" else (arguments[1], 0)
        if path is not None and not isinstance(path, int):  # a module in C has a path when it is imported
            _note(function, _source(os.path.abspath(os.fsdecode(path))), bool(written))


def _source(path: str) -> str:
    """The file of a module, where Python opens what it has compiled of it."""
    return importlib.util.source_from_cache(path) if path.endswith(".pyc") else path


def _note(function: str, path: str, written: bool) -> None:
    is_data = not path.endswith(".py")
    if path == _list or is_installed(path) or (is_data and path.startswith(_HIDDEN)):
        return
    if (_list, function, path, True, 0) in _seen:  # what a function writes into is its own
        return
    changed_at = 0 if written else _time_if_new(path)
    key = _list, function, path, written, changed_at
    if key in _seen:
        return
    _seen.add(key)
    line = Opened(function, path, written, _checksum(path) if changed_at else None)
    descriptor = os.open(_list, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")
    finally:
        os.close(descriptor)


def _time_if_new(path: str) -> int:
    """The time of a file that has changed since the list was made; 0 for an older or missing one."""
    try:
        changed_at = os.stat(path).st_mtime_ns
    except OSError:
        return 0
    return changed_at if changed_at > _since else 0


def _checksum(path: str) -> str | None:
    _thread.reads = True  # what opens the file here is not the user's code
    try:
        return file_digest(Path(path))
    finally:
        _thread.reads = False
