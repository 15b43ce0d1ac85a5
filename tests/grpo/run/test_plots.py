import builtins

import pytest

from grpo.algorithm.statistics import wilson_interval
from grpo.config.json_file import write_json
from grpo.run import hardware, plots
from grpo.run.log import RunLog
from grpo.run.plots import plot_quietly, plot_run, running_mean, series
from grpo.run.records import read_metrics


@pytest.fixture
def run(tmp_path):
    with RunLog(tmp_path, "", trackers=[], quiet=True) as log:
        log.evaluation(0, {"accuracy": 0.25, "accuracy_greedy": 0.5, "prompts": 64})
        for step in range(1, 61):
            depths = {f"draft/acceptance_depth_{depth}": 0.9**depth for depth in (1, 2, 10)}
            loads = {f"moe/layer_{n}/load_{end}": load for n in (1, 2) for end, load in (("min", 0.5), ("max", 1.5))}
            times = {"time/step": 2.0, "time/rollout": 1.0, "time/learn": 0.5}
            log.step(step, {"reward/mean": step / 60, "policy/entropy": float("nan")} | depths | loads | times)
        log.evaluation(60, {"accuracy": 0.5, "accuracy_greedy": 0.75, "prompts": 64})
    return tmp_path


def test_a_run_is_drawn_and_what_was_not_measured_is_left_out(run):
    pytest.importorskip("matplotlib")
    from PIL import Image

    files = plot_run(run)
    assert [file.stem for file in files] == ["reward", "eval_accuracy", "acceptance", "expert_load", "time"]
    for file in files:
        with Image.open(file) as image:
            assert (image.width, image.height >= 540) == (900, True)  # more where the foot has several lines
            assert len(image.getcolors(maxcolors=1 << 20)) > 20, "there is something on it"


def test_the_foot_of_a_figure_has_all_of_the_command(run, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    feet: list[str] = []
    monkeypatch.setattr(figure, "supxlabel", lambda self, text, **_: feet.append(text))
    command = " ".join(f"--some.option_{n} {n}" for n in range(20))
    write_json(run / hardware.FILE, hardware.describe() | {"command": command})
    plot_run(run, only=["reward"])
    assert " ".join(feet[0].split()).endswith(f" · {command}")
    assert max(map(len, feet[0].splitlines())) <= 130  # what fits below a figure


def test_only_some_are_drawn_where_only_some_are_asked_for(run):
    pytest.importorskip("matplotlib")
    assert [file.stem for file in plot_run(run, only=["eval_accuracy", "time"])] == ["eval_accuracy", "time"]


def test_the_accuracy_is_drawn_both_ways_in_its_intervals_unsmoothed(run):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert plots._draw_held_out(axes, read_metrics(run), plots.ACCURACY)
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert curves == {"sampled: 0.500": ([0, 60], [0.25, 0.5]), "greedy: 0.750": ([0, 60], [0.5, 0.75])}
    bounds = [band.get_paths()[0].get_extents() for band in axes.collections]
    assert [(box.y0, box.y1) for box in bounds] == [
        pytest.approx((wilson_interval(16, 64)[0], wilson_interval(32, 64)[1])),
        pytest.approx((wilson_interval(32, 64)[0], wilson_interval(48, 64)[1])),
    ]


def test_where_nothing_can_be_drawn_nothing_is(run, tmp_path, monkeypatch):
    assert plot_quietly(tmp_path / "nowhere") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot_quietly(run) == []


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'quartet-rl\[plots\]'"):
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
