"""How many CPU threads a run computes with: another number gives other bits, so a run keeps its number for life."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar, cast

import torch

from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig
from grpo.config.yaml_file import read_yaml

Config = TypeVar("Config", bound=SftConfig | MtpConfig)

PARAMETERS_PER_THREAD = 8_000_000  # the demo's 2 M learn no faster with two threads, 135 M do


def threads_for(parameters: int) -> int:
    """The number for a policy of this size: OMP_NUM_THREADS where it is set, else one thread for every 8 M parameters,
    as far as this process may use so many cores.

    >>> threads_for(2_000_000)
    1
    """
    return _asked_for() or min(_cores(), max(1, parameters // PARAMETERS_PER_THREAD))


def with_threads(config: Config, resume: str | None) -> Config:
    """`config` with a number of threads, which torch uses from now on.

    `config.threads` where it is given. A run that is resumed has the number in its config.yaml; where that says null,
    the run was started when all cores were the default. Else it is chosen by the policy's size.
    """
    threads = config.threads
    if threads is None and (saved := _config_file(config.output_dir, resume)):
        threads = read_yaml(saved)[0].get("threads") or _asked_for() or _cores()
    if threads is None:
        from grpo.commands.memory import meta_policy, read_shape

        trunk = meta_policy(read_shape(config)[0], False, torch.float32).trunk
        threads = threads_for(sum(parameter.numel() for parameter in trunk.parameters()))
    torch.set_num_threads(threads)
    return cast(Config, config.model_copy(update={"threads": threads}))


def _config_file(output_dir: Path, resume: str | None) -> Path | None:
    """Of the run that is resumed: the one in `output_dir`, or the one whose checkpoint `resume` names."""
    if resume is None:
        return None
    runs = [output_dir] if resume == "auto" else [output_dir, *Path(resume).absolute().parents[1:2]]
    return next((run / "config.yaml" for run in runs if (run / "config.yaml").is_file()), None)


def _asked_for() -> int | None:
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
