"""Experiment trackers through accelerate: TensorBoard by default where installed, any other that is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# The table of rollouts: its columns, and what a line of the record calls them.
COLUMNS = {
    **{"prompt_id": "prompt_id", "sample": "sample", "prompt": "prompt", "completion": "text"},
    **{"reward": "reward", "advantage": "advantage", "finish_reason": "finish_reason"},
}


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


def start(name: str, output_dir: Path, config_yaml: str, resume_step: int) -> GeneralTracker:
    """A started accelerate tracker: log(values, step), finish(). Files of TensorBoard and wandb go below output_dir.

    Raises ValueError with the tracker's own words where it cannot start: nobody is logged in, or no server answers.
    """
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    PartialState()  # without it wandb and trackio raise; TensorBoard and MLflow make it themselves
    if name == "tensorboard":  # purge_step hides what a resumed run will write again
        tracker = tracker_class("tensorboard", output_dir, purge_step=resume_step + 1)
    elif name == "wandb":  # which writes into the working directory otherwise
        tracker = tracker_class(output_dir.name, dir=str(output_dir))
    elif tracker_class.requires_logging_directory:
        tracker = tracker_class(output_dir.name, output_dir / name)
    else:
        tracker = tracker_class(output_dir.name)
    try:
        tracker.start()
        if name != "tensorboard":  # TensorBoard's form of it adds a second run beside every run
            tracker.store_init_configuration(yaml.safe_load(config_yaml) or {})
    except Exception as error:  # each tracker has exceptions of its own
        raise ValueError(
            f"log.trackers: {name} cannot start ({error}); mend that, or take it out of the list"
        ) from error
    return tracker


def log_rollouts(tracker: GeneralTracker, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """The completions of a step as a table of the tracker, where it has tables: wandb, trackio and MLflow. `lines` are
    those of the record, see `rollout_lines`."""
    if tracker.name not in ("wandb", "trackio", "mlflow"):
        return
    table = {column: [_storable(line.get(name)) for line in lines] for column, name in COLUMNS.items()}
    if tracker.name == "wandb":
        tracker.log_table("rollouts", list(table), [list(row) for row in zip(*table.values(), strict=True)], step=step)
    elif tracker.name == "trackio":
        import pandas
        import trackio

        tracker.log({"rollouts": trackio.Table(dataframe=pandas.DataFrame(table))}, step=step)
    else:
        import mlflow

        mlflow.log_table(table, f"rollouts/step_{step:06d}.json")


def _storable(value: object) -> object:
    """Replaces lone surrogates, which UTF-8 lacks, and takes the mean of advantages of single tokens."""
    if isinstance(value, list):
        return sum(value) / max(1, len(value))
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
