"""runs/NAME/sources.json: the files on which the result of a run depends, with their digests.

{"agent.py:play": {"/home/me/agent.py": "9f2c...", "/home/me/prompts.txt": "41ab..."}}: for each function or class that
the configuration names its own file, the user's modules that it imports, and the files that it has opened. The own file
of a reward is in rewards.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from policies.files.atomic import write_file
from rewards.config.json_file import expecting, read_json
from rewards.digests import file_digest
from rewards.opened import OpenedFiles

FILE = "sources.json"

Files = dict[str, dict[str, str | None]]  # digests by function and path; None where a file could not be read


@dataclass(frozen=True)
class Source:
    """A function or class that the configuration names as `function`.

    `path` is its own file, and `code` the digest of what it uses there; None where rewards.json has it. `imports` are
    files of other modules. `reward` is the label of the reward that fails when it fails.
    """

    function: str
    path: str | None = None
    code: str | None = None
    imports: Sequence[Path] = ()
    reward: str | None = None


class Sources:
    """The files of `sources`, and those that were `opened`, but for files in the folders `apart`."""

    def __init__(self, sources: Sequence[Source], opened: OpenedFiles, apart: Sequence[Path] = ()) -> None:
        self._opened, self._apart = opened, apart
        self._own = {(source.function, source.path): source.code for source in sources}
        self._rewards: dict[str, set[str | None]] = {}
        self._files: Files = {}
        self._written: set[str] = set()
        for source in sources:
            self._rewards.setdefault(source.function, set()).add(source.reward)
            files = self._files.setdefault(source.function, {})
            files |= {str(path): file_digest(path) for path in source.imports}
            if source.path and source.code:
                files[source.path] = source.code

    def changed(self, output_dir: Path) -> dict[str, list[str]]:
        """The files that are not as the run in this folder has recorded them, by function."""
        changed: dict[str, list[str]] = {}
        for function, files in read_sources(output_dir).items():
            others = [path for path, then in files.items() if self._now(function, path) != then]
            if others:
                changed[function] = others
        return changed

    def rewards_of(self, function: str) -> set[str | None]:
        """The labels of the rewards that fail when this function fails."""
        return self._rewards.get(function, set())

    def record(self, output_dir: Path) -> None:
        """Write what is known now, together with the files that the run in this folder has recorded before."""
        for function, files in read_sources(output_dir).items():
            if function in self._files:  # --force may have taken it out of the configuration
                now = {path: self._now(function, path) for path in files}
                self._files[function] = now | self._files[function]
        self._look()
        self._write(output_dir)

    def keep_up(self, output_dir: Path) -> None:
        """Write what was opened since."""
        before = json.dumps(self._files)
        self._look()
        if json.dumps(self._files) != before:
            self._write(output_dir)

    def _look(self) -> None:
        for function, path, written, checksum in self._opened.new():
            if written:
                self._written.add(path)
            elif function in self._files and (function, path) not in self._own:
                self._add(self._files[function], Path(path), checksum)
        for files in self._files.values():
            for path in self._written & files.keys():
                del files[path]

    def _add(self, files: dict[str, str | None], path: Path, checksum: str | None) -> None:
        """Add a file as it was read. One that was newer than the run brings its `checksum`, and the last one counts. It
        is left out if it is gone: then a program that the function started had made it for a while. One that has
        changed since it was read has None, which is never as it was."""
        if any(path.is_relative_to(folder) for folder in self._apart):
            return
        with suppress(OSError):  # it may be gone already, or be secret
            if checksum is not None and path.is_file():
                files[str(path)] = checksum
            elif str(path) not in files and path.is_file():
                is_as_read = path.stat().st_mtime_ns <= self._opened.since
                files[str(path)] = file_digest(path) if is_as_read else None

    def _now(self, function: str, path: str) -> str | None:
        with suppress(OSError):
            return self._own.get((function, path)) or file_digest(Path(path))
        return None

    def _write(self, output_dir: Path) -> None:
        write_file(output_dir / FILE, json.dumps(self._files, indent=1) + "\n")


def read_sources(output_dir: Path) -> Files:
    """Empty for a run of 0.2, which recorded none. Raises ValueError for a damaged file."""
    path = output_dir / FILE
    files = read_json(path, dict) if path.exists() else {}
    with expecting(path, "record of files"):
        return {function: dict(digests.items()) for function, digests in files.items()}
