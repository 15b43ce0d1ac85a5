"""Policies for those that learn from another one."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folders(random_policy, tmp_path_factory) -> Path:
    """A folder that holds a `student` and a `teacher`."""
    root = tmp_path_factory.mktemp("policies")
    for seed, name in ((1, "student"), (2, "teacher")):
        random_policy(seed, mtp=False).save(root / name)
    return root
