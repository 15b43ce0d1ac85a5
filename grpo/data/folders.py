"""Where a checkpoint or a policy belongs: the run around it, also where a link or a relative path names it."""

from __future__ import annotations

import os
from pathlib import Path


def around(path: str | Path) -> list[Path]:
    """A path, its folder and the folder around that: where links lead, and then as they are named.

    >>> around("runs/demo/checkpoints/step_000010")[2]
    PosixPath('/home/me/runs/demo')
    """
    places = Path(path).resolve(), Path(os.path.abspath(path))
    return [folder for place in places for folder in (place, *place.parents[:2])]


def run_of(checkpoint: Path) -> Path:
    """The run folder that holds a checkpoint as checkpoints/step_000010, as the checkpoint is named where that names
    it, too."""
    named = checkpoint.parent.parent
    for run in around(checkpoint)[2::3]:
        if (run / "config.yaml").is_file():
            return named if named.is_dir() and named.samefile(run) else run
    return named
