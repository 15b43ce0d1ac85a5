"""Which problems a policy was trained on, by fingerprint, so that nothing evaluates it on them (contract 16)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from policies.files.atomic import write_file

TRAINED_ON = "trained_on.txt"  # in a run folder: a fingerprint a line

_FINGERPRINT = re.compile(rb"[0-9a-f]{12}")


def record_trained_on(run: Path, fingerprints: Iterable[str]) -> None:
    """Write the fingerprints of all problems that the policy of this run was trained on, here and before."""
    lines = sorted({*fingerprints, *trained_on(run)})
    write_file(run / TRAINED_ON, "".join(f"{line}\n" for line in lines))


def trained_on(model: str | Path) -> frozenset[str]:
    """The fingerprints that were recorded for a policy; empty where none are known, as for a preset or a hub id.

    `model` is a run, a policy or a checkpoint inside a run, or an export of one.
    """
    folder = Path(model)
    places = (folder, folder / "run", folder.parent, folder.parent.parent)
    for index, place in enumerate(places):
        if (place / TRAINED_ON).is_file() and (index < 2 or (place / "environment.json").is_file()):
            lines = (place / TRAINED_ON).read_bytes().split()
            if wrong := [line for line in lines if not _FINGERPRINT.fullmatch(line)]:
                raise ValueError(f"{place / TRAINED_ON} is damaged: {wrong[0]!r:.60} is no fingerprint of a problem")
            return frozenset(line.decode() for line in lines)
    return frozenset()
