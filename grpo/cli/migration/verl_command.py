"""Reads a command of verl's, `python3 -m verl.trainer.main_ppo key=value ...`, as options of ours."""

from __future__ import annotations

from pathlib import Path

from grpo.cli.migration.migration import Migration


def read_verl_command(command: str | Path, folder: Path) -> Migration:
    """Reads a command, or a shell file that holds one. Data that has to be written anew is written into `folder`.

    Raises ValueError where there is no such command.
    """
    raise NotImplementedError
