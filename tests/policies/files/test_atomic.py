"""Files and folders that are the former or the new ones, wherever the process is killed."""

import errno
import os

import pytest
from killing import kills_itself

from policies.files.atomic import tidy, write_file, write_folder


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

        killed = kills_itself(rewrite, call)
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
