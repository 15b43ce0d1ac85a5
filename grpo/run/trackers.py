"""Experiment trackers through accelerate: TensorBoard by default where installed, any other that is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def installed(names: Sequence[str] | None) -> list[str]:
    """`names`, after checking that each is there. None means TensorBoard where installed. Raises ValueError."""
    if names is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = sorted(map(str, get_available_trackers()))
    for name in names:
        if name not in available:
            way_out = "install it" if name in LOGGER_TYPE_TO_CLASS else f"known are {sorted(LOGGER_TYPE_TO_CLASS)}"
            raise ValueError(f"log.trackers: {name!r} is not installed ({way_out}); installed are {available}")
    return list(names)


def start(name: str, output_dir: Path, config_yaml: str, resume_step: int) -> Any:
    """A started accelerate tracker: log(values, step), finish(). Files go below output_dir."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # purge_step hides what a resumed run will write again
        tracker = tracker_class("tensorboard", output_dir, purge_step=resume_step + 1)
    elif tracker_class.requires_logging_directory:
        tracker = tracker_class(output_dir.name, output_dir / name)
    else:
        tracker = tracker_class(output_dir.name)
    tracker.start()
    if name != "tensorboard":  # TensorBoard's form of it adds a second run beside every run
        tracker.store_init_configuration(yaml.safe_load(config_yaml) or {})
    return tracker
