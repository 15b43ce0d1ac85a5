"""A short form of benchmarks/chaos, and its plan of strikes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.strikes import MOMENTS, OWN_CLUSTER, SHARED_CLUSTER, plan

ROOT = Path(__file__).parents[2]


def test_a_seed_has_its_plan_and_all_seeds_together_have_every_strike_in_every_moment():
    assert plan(3, 10, OWN_CLUSTER, measures=True) == plan(3, 10, OWN_CLUSTER, measures=True)
    assert plan(3, 10, OWN_CLUSTER, measures=True) != plan(4, 10, OWN_CLUSTER, measures=True)
    assert plan(3, 10, OWN_CLUSTER, measures=True)[0].moment == "measuring"
    for choices in (OWN_CLUSTER, SHARED_CLUSTER):
        found = {blow for seed in range(60) for blow in plan(seed, 10, choices, measures=False)}
        assert {(blow.what, blow.how) for blow in found} == set(choices)
        assert {blow.moment for blow in found} == set(MOMENTS)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])  # one of each kind of run
def test_a_run_that_is_struck_ends_like_one_that_is_not(tmp_path, seed):
    command = [sys.executable, "-m", "benchmarks.chaos", "--faults", "3", "--runs", "1", "--first", str(seed)]
    command += ["--steps", "12", "--folder", str(tmp_path), "--json", str(tmp_path / "chaos.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = json.loads((tmp_path / "chaos.json").read_text())["runs"]
    assert (run["equal"], run["left"], len(run["strikes"])) == (True, [], 3)
