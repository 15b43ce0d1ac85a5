"""What benchmarks/algorithms.py makes of its runs' curves, by hand."""

import doctest
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/algorithms.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_algorithms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _curve(*points):
    keys = ("step", "samples", "seconds", "accuracy")
    return [dict(zip(keys, point, strict=True)) for point in points]


QUICK = _curve((0, 0, 0.0, 0.5), (10, 100, 10.0, 0.7), (20, 200, 20.0, 0.9))
SLOW = _curve((0, 0, 0.0, 0.5), (10, 100, 20.0, 0.6), (20, 200, 40.0, 0.8))


def test_docstring_examples(script):
    assert doctest.testmod(script).failed == 0


def test_the_summary_by_hand(script):
    cells = [
        {"seed": seed, "algorithm": name, "curve": points}
        for seed in (0, 1)
        for name, points in (("grpo", QUICK), ("ppo", SLOW))
    ]
    summary = script.summarise(cells, target=0.7)
    assert (summary["equal_samples"], summary["equal_seconds"]) == (200, 20.0)
    grpo, ppo = summary["algorithms"]["grpo"], summary["algorithms"]["ppo"]
    assert (grpo["samples_to_target_mean"], grpo["seconds_to_target_mean"]) == (100, 10.0)
    assert (ppo["samples_to_target_mean"], ppo["seconds_to_target_mean"]) == (150, 30.0)
    assert (grpo["ppo_samples_over_own"], grpo["ppo_seconds_over_own"]) == (1.5, 3.0)
    assert (grpo["accuracy_at_equal_seconds"], ppo["accuracy_at_equal_seconds"]) == (0.9, 0.6)
    assert (grpo["accuracy_at_equal_samples"], ppo["accuracy_at_equal_samples"]) == (0.9, 0.8)


def test_a_seed_that_never_gets_there_leaves_no_mean_and_no_ratio(script):
    cells = [
        {"seed": 0, "algorithm": "grpo", "curve": QUICK},
        {"seed": 0, "algorithm": "ppo", "curve": SLOW},
        {"seed": 1, "algorithm": "grpo", "curve": SLOW},
        {"seed": 1, "algorithm": "ppo", "curve": SLOW},
    ]
    grpo = script.summarise(cells, target=0.85)["algorithms"]["grpo"]
    assert grpo["samples_to_target"] == [175, None]
    assert grpo["samples_to_target_mean"] is None
    assert grpo["ppo_samples_over_own"] is None
    assert grpo["accuracy_at_equal_samples_std"] == pytest.approx(0.05)


def test_the_options_of_every_algorithm_are_valid(script, tmp_path):
    for name, own in script.ALGORITHMS.items():
        config = script.load(script.TrainConfig, script.DEMO, script.OPTIONS | own | {"output_dir": str(tmp_path)})
        assert (config.loss.loss_type == "reinforce") == (name == "rank_softmax")
        assert config.learner.updates_per_batch == 1


def test_the_plot_is_drawn(script, tmp_path):
    pytest.importorskip("matplotlib")
    cells = [{"seed": 0, "algorithm": name, "curve": QUICK} for name in script.ALGORITHMS]
    script.draw(cells, 0.7, tmp_path / "plot.png", "here")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["algorithms", "learner"])
def test_a_script_finds_our_packages_and_not_the_files_beside_it(name):
    """Python puts a script's folder first, and benchmarks/rollout.py is there."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2])\n"
    code += "import rollout.sampling"
    command = [sys.executable, "-c", code, str(SCRIPT.parent), str(SCRIPT.with_name(f"{name}.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
