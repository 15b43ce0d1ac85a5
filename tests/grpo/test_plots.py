import builtins

import pytest

from grpo.plots import plot_run, running_mean, series
from grpo.run_log import RunLog


@pytest.fixture
def run(tmp_path):
    with RunLog(tmp_path, "", trackers=[], quiet=True) as log:
        log.evaluation(0, {"accuracy": 0.25})
        for step in range(1, 61):
            depths = {f"draft/acceptance_depth_{depth}": 0.9**depth for depth in (1, 2, 10)}
            times = {"time/step": 2.0, "time/rollout": 1.0, "time/learn": 0.5}
            log.step(step, {"reward/mean": step / 60, "policy/entropy": float("nan")} | depths | times)
        log.evaluation(60, {"accuracy": 0.5})
    return tmp_path


def test_a_run_is_drawn_and_what_was_not_measured_is_left_out(run):
    pytest.importorskip("matplotlib")
    from PIL import Image

    files = plot_run(run)
    assert [file.stem for file in files] == ["reward", "eval_accuracy", "acceptance", "time"]
    for file in files:
        with Image.open(file) as image:
            assert image.size == (900, 540)
            assert len(image.getcolors(maxcolors=1 << 20)) > 20, "there is something on it"


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'quartet-rl\[plots\]'"):
        plot_run(run)


def test_a_run_without_two_steps_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    RunLog(tmp_path, "", trackers=[], quiet=True).close()
    with pytest.raises(ValueError, match="has 0 steps; a curve needs two"):
        plot_run(tmp_path)


def test_series_and_running_mean_by_hand():
    assert series([{"step": 1, "loss/mtp": 2.0}, {"step": 2, "loss/mtp": None}, {"step": 3}], "loss/mtp") == (
        [1],
        [2.0],
    )
    assert running_mean([0.0, 3.0, 6.0, 3.0], 3) == [1.5, 3.0, 4.0, 4.5]
    assert running_mean([1.0, 2.0], 1) == [1.0, 2.0]
