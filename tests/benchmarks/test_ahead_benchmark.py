"""What benchmarks/ahead.py makes of the seconds of its runs, by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/ahead.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_ahead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_first_steps_and_the_waiting_are_left_out(script):
    steps = [{"time/step": 9.0, "time/rollout": 9.0, "time/learn": 9.0}] * 3
    steps += [
        {"time/step": 3.0, "time/rollout": 2.0, "time/reward": 0.5, "time/learn": 2.0, "time/wait": 0.5},
        {"time/step": 5.0, "time/rollout": 4.0, "time/learn": 2.0, "time/publish": 0.2},
    ]
    seconds = script.seconds_of(steps)
    assert seconds == pytest.approx({"step": 4.0, "rollout": 3.25, "learn": 1.75, "wait": 0.25, "publish": 0.1})


def test_the_ceiling_is_the_slower_half_and_what_is_reached_a_share_of_it(script):
    def row(step, rollout=0.0, learn=0.0):
        return {"step": step, "rollout": rollout, "learn": learn, "wait": 0.0, "publish": 0.0}

    rows = {"two threads": row(6.0), "one thread": row(9.0, 5.0, 4.0), "ahead 1": row(5.0), "ahead 2": row(7.5)}
    found = script.compared(rows)
    assert found["ceiling"] == pytest.approx(6 / 5)
    assert (found["ahead 1"], found["ahead 1 of the ceiling"]) == pytest.approx((1.2, 1.0))
    assert (found["ahead 2"], found["ahead 2 of the ceiling"]) == pytest.approx((0.8, 2 / 3))
    assert "ceiling with both cores busy" not in found
    busy = script.compared(rows | {"two at once": row(11.0, 6.0, 5.0)})
    assert busy["ceiling with both cores busy"] == pytest.approx(1.0)
    assert busy["ceiling"] == found["ceiling"]
