"""A run that is stopped and goes on, beside one that was never stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.run import checkpoint
from grpo.run.stop import Stopped
from grpo.train import train
from rewards.records import read_rollouts


def whole_and_parts(config_of: Callable[[Path], Any], folder: Path, stop_after: int = 1) -> tuple[Path, Path]:
    """Their folders, after contract 9: the same tensors and state after the last step, and the same rollouts."""
    whole, parts = folder / "whole", folder / "parts"
    train(config_of(whole))
    with pytest.raises(Stopped):
        train(config_of(parts), stop_after=stop_after)
    train(config_of(parts), resume="auto")
    last = config_of(whole).steps
    first, second = (checkpoint.load(path / f"checkpoints/step_{last:06d}") for path in (whole, parts))
    assert first.state == second.state
    assert first.tensors.keys() == second.tensors.keys()
    for part, tensors in first.tensors.items():
        assert [name for name, t in tensors.items() if not torch.equal(t, second.tensors[part][name])] == [], part
    for step in range(1, last + 1):
        assert read_rollouts(whole, step) == read_rollouts(parts, step)
    return whole, parts
