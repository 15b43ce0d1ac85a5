"""The machine of a run, as environment.json describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewards.config.json_file import expecting, read_json


def read_machine(path: Path) -> dict[str, Any]:
    """Gives what `describe` said when the file was written. Raises ValueError naming the file where it is damaged."""
    environment = read_json(path)
    with expecting(path, "description of a machine"):
        caption(environment)
        environment["time"], dict(environment["versions"])
    return environment


def caption(environment: dict[str, Any]) -> str:
    """One line under what was measured: `AMD EPYC 9R14, 2 cores · torch 2.13.0 · quartet train a.yaml`."""
    hardware, versions = environment["hardware"], environment["versions"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"{device} · torch {versions['torch']} · {environment['command']}"
