"""Reads a script with TRL's GRPOConfig and GRPOTrainer without training, as options of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo.cli.migration.migration import Migration


def read_trl_script(
    script: Path, folder: Path, arguments: Sequence[str] = (), *, processes: int = 1, timeout_s: float = 600.0
) -> Migration:
    """Runs `script` with its `arguments`, up to its GRPOTrainer, in a process of its own; no model is loaded.

    Data that it has made in memory, and functions that cannot be imported from where they are, are written into
    `folder`. `processes` is how many the script would be launched with. Raises ValueError with what the script has
    printed last where it makes no GRPOTrainer.
    """
    raise NotImplementedError
