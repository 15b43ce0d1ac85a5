"""docs/lessons: each script in small prints what its page says, and its picture is drawn from what it returns."""

import os
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
from conftest import MICRO
from copies import Copy

from policies.presets import PRESETS

LESSONS = Path(__file__).parents[2] / "docs/lessons"


def lines(name, folder):
    """What the small form of a script prints."""
    variables = {"PYTHONPATH": str(LESSONS.parents[1]), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, str(LESSONS / f"{name}.py"), "--small"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Copy(command, env=os.environ | variables, **pipes) as process:
        said, errors = process.communicate()
    assert process.returncode == 0, said[-3000:] + errors[-3000:]
    return said.splitlines()


@pytest.fixture
def micro(monkeypatch):
    """The lessons have a micro policy: no assertion depends on its size."""
    monkeypatch.setitem(PRESETS, "tiny", MICRO)


@pytest.mark.long
def test_a_group_whose_rewards_are_equal_teaches_nothing(micro, tmp_path):
    said = "\n".join(lines("group", tmp_path))
    assert re.search(r"^0 of 8 right: own prompt \+0\.000, other prompts \+0\.0000", said, re.MULTILINE)
    assert len(re.findall(r"^groups of \d+: [01]\.\d\d should be mixed", said, re.MULTILINE)) == 4


@pytest.mark.long
def test_losses_agree_at_the_first_update_alone(micro, monkeypatch, tmp_path):
    """Of one digit, since groups must be mixed and this policy soon answers some of them."""
    monkeypatch.syspath_prepend(str(LESSONS))
    lesson = import_module("backward")
    monkeypatch.setattr(lesson, "half_taught", partial(lesson.half_taught, digits=1))
    found = [re.match(r"(\w+), updates: (\d), (.*)", line) for line in lines("off_policy", tmp_path)]
    said = {(one[1], int(one[2])): one[3] for one in found if one}
    assert len(said) == 6
    first = {said[name, 0] for name in ("uncorrected", "weighted", "clipped")}
    second = {said[name, 1] for name in ("uncorrected", "weighted", "clipped")}
    assert (len(first), len(second)) == (1, 1)
    assert first != second


@pytest.mark.long
def test_drafts_change_no_completion_whoever_makes_them(micro, tmp_path):
    said = [line for line in lines("drafts", tmp_path) if "draft head, drafts:" in line]
    assert len(said) == 8
    assert all("completions that differ: 0," in line for line in said)
