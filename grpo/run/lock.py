"""Who may write into a run folder: one run at a time (runs/NAME/.lock), and none where a run has been before."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

from review.readers.run_folder import holds_a_run

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOGGER = logging.getLogger(__name__)
FILE = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class FolderInUse(OSError):
    """Another run writes into the folder; the message names its process and host."""


class RunLock:
    """Held from `lock_folder` to `release`, and only while this process lives: the system releases it, not the file.

    Where the folder exists it is taken at once, so that a run that goes on reads nothing that another one is writing.
    A folder that does not exist is made by `lock_folder` only. Raises FolderInUse. A file system without locks gives a
    warning, and no protection.
    """

    def __init__(self, folder: Path, key: str = "output_dir") -> None:
        """`key` is the option that names the folder."""
        self.folder, self.key, self._descriptor = folder, key, -1
        if os.path.isdir(folder):  # also where the system refuses the name: RunLog says so, with the way out
            self.lock_folder()

    def lock_folder(self) -> None:
        if self._descriptor >= 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE
        # Never replaced or removed: the lock belongs to the file itself. Not inherited by programs that are started.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except OSError as error:
            owner = _owner(descriptor)
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise FolderInUse(
                    f"{self.key}={self.folder} is in use by another run ({owner}); wait for its end, stop it, or "
                    f"choose another {self.key}"
                ) from None
            LOGGER.warning("%s cannot be locked (%s): see to it that no other run uses this folder", path, error)
            return
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n")

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _lock(descriptor: int) -> None:
    """Take the lock of an open file. Raises OSError where another process has it, or where there are no locks."""
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a byte after the owner's name, since a locked one cannot be read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        owner = json.loads(os.read(descriptor, 4096))
        return f"process {owner['pid']} on host {owner['host']}"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has not written its name yet
        return "which has just begun"


def refuse_folder(output_dir: Path, *, resuming: bool) -> None:
    """Raises FileExistsError for a folder that holds a run, unless it is `resuming`, and OSError for one that cannot be
    written. The folder is left as it was, also where it was not there."""
    made: list[Path] = []
    try:
        holds = holds_a_run(output_dir)
        for folder in [] if holds else reversed([output_dir, *output_dir.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        with TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        at = next((f": {str(path)!r}" for path in output_dir.parents if str(path) == error.filename), "")
        why = f"{error.strerror}{at}"
        raise type(error)(f"output_dir: {output_dir} cannot be written ({why}); choose another folder") from error
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # another process has put something into it
                folder.rmdir()
    if holds and not resuming:
        raise FileExistsError(
            f"output_dir={output_dir} already holds a run; choose another output_dir, go on with --resume auto, "
            "or delete it"
        )
