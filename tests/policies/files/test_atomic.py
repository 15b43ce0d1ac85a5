"""Files and folders that are the former or the new ones, wherever the process is killed."""

import errno
import os
import signal

import pytest

from policies.files.atomic import tidy, write_file, write_folder


def _killed(action, call: int) -> bool:
    """Run `action` in a process that kills itself before its `call`-th change to the disk; False when it ended."""
    child = os.fork()
    if child == 0:
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
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _fill(folder, value: str) -> None:
    with write_folder(folder) as partial:
        partial.mkdir()
        for name in "ab":
            (partial / name).write_text(value)


def _value(folder) -> str:
    [value] = {(folder / name).read_text() for name in "ab"}
    return value


def test_a_killed_write_leaves_the_former_or_the_new(tmp_path):
    outcomes = []
    for call in range(1, 100):
        place = tmp_path / str(call)
        place.mkdir()
        write_file(place / "file", "old")
        _fill(place / "folder", "old")

        def rewrite(place=place):
            write_file(place / "file", "new")
            _fill(place / "folder", "new")

        killed = _killed(rewrite, call)
        assert (place / "file").read_text() in ("old", "new")
        tidy(place)
        outcomes.append(_value(place / "folder"))
        assert sorted(path.name for path in place.iterdir()) == ["file", "folder"]
        if not killed:
            break
    assert not killed
    assert outcomes == sorted(outcomes, reverse=True)
    assert len(outcomes) > 9
    assert set(outcomes) == {"old", "new"}


def test_a_full_disk_names_the_file_and_leaves_the_former(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "old")
    _fill(tmp_path / "folder", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*/file"):
        write_file(tmp_path / "file", "new")
    with pytest.raises(OSError, match="No space left"):
        _fill(tmp_path / "folder", "new")
    assert (tmp_path / "file").read_text() == _value(tmp_path / "folder") == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_disk_has_the_content_before_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), order.append(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), order.append("renamed")))
    write_file(tmp_path / "file", b"new")
    assert order == [str(tmp_path / ".file.partial"), "renamed", str(tmp_path)]
    order.clear()
    _fill(tmp_path / "folder", "new")
    partial = tmp_path / ".folder.partial"
    assert sorted(order[:3]) == [str(partial), str(partial / "a"), str(partial / "b")]
    assert order[3:] == ["renamed", str(tmp_path)]
