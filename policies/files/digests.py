"""Sizes and SHA-256 of a folder's files, in a file beside them: what was written is what is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from policies.files.atomic import write_file

DIGESTS = "digests.json"  # of a policy's folder


def digests(folder: Path) -> str:
    """Of all the files that are in `folder` now: {"files": {"config.json": {"bytes": .., "sha256": ".."}, ..}}."""
    return json.dumps(
        {"files": {file.name: size_and_hash(file) for file in sorted(folder.iterdir()) if file.is_file()}}, indent=1
    )


def write_digests(folder: Path) -> None:
    """For `check_policy`, beside the files of a policy that is complete."""
    (folder / DIGESTS).unlink(missing_ok=True)
    write_file(folder / DIGESTS, digests(folder))


def fault(folder: Path, name: str, needed: Collection[str] = ()) -> str | None:
    """What is wrong with a folder, in words, or None. Weights that are not listed are wrong, and `needed` files that
    are not there; other files may have been added."""
    try:
        expected = dict(json.loads((folder / name).read_text())["files"])
        listed = {*expected, *(file.name for file in folder.glob("*.safetensors")), *needed}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{name} cannot be read ({error!r})"
    for file in sorted(listed):
        found = size_and_hash(folder / file) if (folder / file).is_file() else "missing"
        if found != expected.get(file):
            return f"{file} is {found}, {name} says {expected.get(file)}"
    return None


def check_policy(folder: Path) -> None:
    """Raises PolicyError where a file of a policy that a run has saved is not what it wrote.

    A folder without digests passes: of another tool, or of an older version.
    """
    from policies.layout import PolicyError  # with transformers, which readers of a run's records do not need

    if (folder / DIGESTS).is_file() and (found := fault(folder, DIGESTS)):
        raise PolicyError(
            f"model={str(folder)!r} is damaged: {found}; restore the file from a copy, or delete "
            f"{folder / DIGESTS} if you have changed the policy yourself"
        )


def size_and_hash(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
