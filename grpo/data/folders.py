"""Where a checkpoint or a policy belongs: the run around it, also where a link or a relative path names it."""

from __future__ import annotations

import os
from pathlib import Path


def around(path: str | Path) -> list[Path]:
    """A path, its folder and the folder around that: first where links lead, then as the path is written.

    >>> around("runs/demo/checkpoints/step_000010")[2]
    PosixPath('/home/me/runs/demo')
    """
    places = Path(path).resolve(), Path(os.path.abspath(path))
    return [folder for place in places for folder in (place, *place.parents[:2])]


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint in its checkpoints/. If the checkpoint's own path names the run, so does the
    result, and no link in it is followed."""
    named = checkpoint.parent.parent
    for place in (checkpoint.resolve(), Path(os.path.abspath(checkpoint))):
        run = place.parent.parent
        if (run / "config.yaml").is_file():
            return named if named.is_dir() and named.samefile(run) else run
    return named
