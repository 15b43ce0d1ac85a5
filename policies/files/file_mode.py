"""The mode of a file that a library wrote for its owner alone."""

from __future__ import annotations

from pathlib import Path


def heed_umask(folder: Path) -> None:
    """Give the safetensors of `folder` the mode of any other new file. The library writes them with 0600, whatever the
    umask is, so that nobody else of a team could read the weights beside a config.json that they can read."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
