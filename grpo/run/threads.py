"""How many CPU threads a run computes with: another number gives other bits, so a run keeps its number for life."""

from __future__ import annotations

import os
from pathlib import Path

from grpo.config.yaml_file import read_yaml

PARAMETERS_PER_THREAD = 8_000_000  # the demo's 2 M learn no faster with two threads, 135 M do


def threads_for(parameters: int) -> int:
    """The number for a policy of this size: OMP_NUM_THREADS where it is set, else one thread for every 8 M parameters,
    as far as this process may use so many cores.

    >>> threads_for(2_000_000)
    1
    """
    return _asked_for() or min(_cores(), max(1, parameters // PARAMETERS_PER_THREAD))


def saved_threads(output_dir: Path, resume: str | None) -> int | None:
    """The number of the run that is resumed, from the config.yaml in `output_dir` or beside the checkpoint that
    `resume` names; None for a new run.

    Where config.yaml says null, the run was started when all cores were the default.
    """
    if resume is None:
        return None
    runs = [output_dir] if resume == "auto" else [output_dir, *Path(resume).absolute().parents[1:2]]
    saved = [run / "config.yaml" for run in runs if (run / "config.yaml").is_file()]
    return read_yaml(saved[0])[0].get("threads") or _asked_for() or _cores() if saved else None


def _asked_for() -> int | None:
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
