"""Files and folders that are complete or absent: they are written aside, fsynced and renamed.

A process that is killed may leave `.NAME.partial`, which it was writing, `.NAME.removed`, which it was deleting, and
`.NAME.replaced`, the former folder of this name. `tidy` removes them, and restores a former folder without a successor.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8), all of it or nothing. Raises OSError, which names the file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        fsync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yields `.NAME.partial` to be filled; at the end it replaces `folder`, unless an exception was raised."""
    partial, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            fsync(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(partial, folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            os.replace(replaced, folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def fsync(path: Path) -> None:
    """Windows flushes files that were opened for writing, and no folders."""
    on_windows = sys.platform == "win32"
    if on_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tidy(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what a killed process has left in `folder`; with `names`, only of files and folders with these names.

    No other process may be writing there.
    """
    for path in list(folder.glob(".*")):
        name, _, suffix = path.name.removeprefix(".").rpartition(".")
        if not name or (names is not None and name not in names):
            continue
        if suffix == "replaced" and not (folder / name).exists():
            os.replace(path, folder / name)
        elif suffix in ("partial", "removed", "replaced"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def heed_umask(folder: Path) -> None:
    """Give the safetensors of `folder` the mode of any other new file. Their library writes them with 0600 whatever the
    umask is, so that others of a team could read config.json but not the weights."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
