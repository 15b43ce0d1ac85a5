"""Sizes and SHA-256 of a folder's files, in a file beside them: they show whether what is read is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from policies.files.atomic import write_file

CHECKSUMS = "digests.json"  # of a policy's folder


def checksums(folder: Path) -> str:
    """JSON for all files that are in `folder` now: {"files": {"config.json": {"bytes": .., "sha256": ".."}, ..}}."""
    return listing({file.name: size_and_hash(file) for file in folder.iterdir() if file.is_file()})


def listing(files: Mapping[str, dict[str, Any]]) -> str:
    """JSON of the `size_and_hash` of files by name, as `fault` reads it."""
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1)


def write_checksums(folder: Path) -> None:
    """Write them beside the files of a complete policy, for `policies.checkpoint.check_policy`."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    write_file(folder / CHECKSUMS, checksums(folder))


def fault(folder: Path, name: str, needed: Collection[str] = (), share: slice = slice(None)) -> str | None:
    """Tells what is wrong with a folder, in words, or None. Unlisted weights are wrong, and so are absent `needed`
    files; other files may have been added. `share` looks at some of the files only, in the order of their names."""
    try:
        expected = dict(json.loads((folder / name).read_text())["files"])
        listed = {*expected, *(file.name for file in folder.glob("*.safetensors")), *needed}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{name} cannot be read ({error!r})"
    for file in sorted(listed)[share]:
        present = size_and_hash(folder / file) if (folder / file).is_file() else "missing"
        if present != expected.get(file):
            return f"{file} is {present}, {name} says {expected.get(file)}"
    return None


def size_and_hash(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
