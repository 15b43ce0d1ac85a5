"""Runs as curves with seeds: which belong together, numbers by hand, and how many seeds each number has; what a run has
learned, in a sentence."""

import json
import re

import pytest
import yaml

from grpo.cli.parse import main
from review.compare.compare import Point, compare
from review.page.headline import headline
from review.statistics.estimates import difference_interval
from tests.cases.control_results import control_result, write_control


@pytest.fixture
def make(tmp_path):
    """`make("a", seed=0, rate=0.1, reward=[.1, .2])`: a run folder with these mean rewards from step 1 on."""

    def make(name, seed=0, rate=0.1, reward=(0.5,), accuracy=None):
        folder = tmp_path / name
        folder.mkdir()
        config = {"seed": seed, "output_dir": str(folder), "steps": 3, "learner": {"learning_rate": rate}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        rows = [{"step": step, "reward/mean": value} for step, value in enumerate(reward, start=1)]
        rows += [{"step": 0, "eval/accuracy": accuracy}] if accuracy is not None else []
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


def test_runs_that_differ_in_nothing_but_the_seed_are_one_group(make):
    runs = [make("a0"), make("b0", rate=0.2), make("a1", seed=1), make("a2", seed=2)]
    found = compare(runs)
    assert {letter: [run.folder for run in group] for letter, group in found.groups.items()} == {
        "A": [runs[0], runs[2], runs[3]],
        "B": [runs[1]],
    }
    assert found.differing == {"learner.learning_rate": {"A": 0.1, "B": 0.2}}


def test_the_median_over_seeds_and_its_interval_by_hand(make):
    """Five values of a median lie all above it, or all below it, in 2 / 2⁵ of all cases."""
    rewards = (0.6, 0.2, 0.7, 0.5, 0.65)  # one run has failed
    runs = [make(f"a{seed}", seed=seed, reward=[value, 1.0]) for seed, value in enumerate(rewards)]
    point = compare(runs).points["reward/mean"][1]["A"]
    assert (point.mean, point.median, point.median_interval) == (pytest.approx(0.53), 0.6, (0.2, 0.7))
    assert str(point) == "0.600 (0.200 to 0.700)"
    assert str(Point([0.25])) == "0.250"
    assert str(Point([0.25, 0.75, 0.5])) == "0.500 (0.250, 0.750, 0.500)"  # too few for an interval, so the values
    assert Point([0.25, 0.75, 0.5, 0.5]).median_interval is None


def test_a_run_that_has_not_got_so_far_is_not_counted(make, capsys):
    runs = [make("a0", reward=[0.1, 0.2]), make("a1", seed=1, reward=[0.3]), make("b", rate=0.2, reward=[0.5, None])]
    assert [point.values for point in compare(runs).points["reward/mean"][2].values()] == [[0.2]]
    assert main(["compare", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    assert "0.200 [n = 1]" in shown
    assert "0.200 (0.100, 0.300)" in shown
    assert "one seed: the value itself; it says nothing about how far another seed would be from it" in shown
    assert "two to four seeds: their mean and the values; they are too few for an interval" in shown
    assert "five seeds" not in shown
    assert f"`quartet-review view {' '.join(map(str, [runs[0], runs[1], runs[2]]))}`" in shown


def test_json_has_the_value_of_every_run(make, tmp_path, capsys):
    runs = [make(f"a{seed}", seed=seed, accuracy=seed / 4) for seed in range(3)]
    assert main(["compare", *map(str, runs), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["groups"] == {"A": {"runs": [str(run) for run in runs], "seeds": [0, 1, 2]}}
    assert found["differing"] == {}
    assert list(found["metrics"]) == ["reward/mean", "eval/accuracy"]
    [row] = found["metrics"]["eval/accuracy"]
    assert (row["step"], row["A"]["n"], row["A"]["mean"], row["A"]["values"]) == (0, 3, 0.25, [0.0, 0.25, 0.5])
    assert (row["A"]["median"], row["A"]["median_interval"]) == (0.25, None)


def test_steps_are_those_that_were_asked_for_or_a_dozen_from_first_to_last(make):
    run = make("a", reward=[step / 100 for step in range(1, 101)])
    points = compare([run]).points["reward/mean"]
    assert (len(points), min(points), max(points)) == (12, 1, 100)
    assert list(compare([run], steps=[7, 3]).points["reward/mean"]) == [3, 7]


def test_what_no_run_has_is_refused(make, capsys):
    for run, options, message in (
        (make("a"), ["--metrics", "reward/meen"], "reward/meen: no run has recorded it; the nearest .* 'reward/mean'"),
        (make("b"), ["--steps", "9"], "--steps 9: no run has recorded this step"),
        (make("c", reward=[]), ["--metrics", "x"], "c: its metrics.jsonl has no step yet"),
    ):
        assert main(["compare", str(run), *options]) == 1
        assert re.search(message, capsys.readouterr().err)


def test_the_same_run_twice_is_no_second_seed(make, tmp_path):
    with pytest.raises(ValueError, match=r"RUN=.*b: .*a has the same options and seed 0, so the two are one run"):
        compare([make("a"), make("b")])
    with pytest.raises(ValueError, match="there is no such folder"):
        compare([tmp_path / "none"])


def test_runs_with_controls_are_compared_with_them_over_seeds(make, tmp_path, capsys):
    """The lowest and the highest of five differences hold their median."""
    runs = [make(f"a{seed}", seed=seed) for seed in range(6)]
    for run, supervised in zip(runs, (0.5, 0.6, 0.4, 0.55, 0.85), strict=False):  # the last run has no control
        write_control(run, control_result(supervised=supervised))
    runs.append(make("b", rate=0.2))
    assert main(["compare", *map(str, runs), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["controls"]
    assert list(found) == ["A"]
    supervised = found["A"]["sampled"]["supervised"]
    assert (supervised["name"], supervised["n"], supervised["median"]) == ("supervised steps", 5, pytest.approx(0.55))
    minus = supervised["grpo_minus"]
    assert (minus["mean"], minus["median"]) == (pytest.approx(0.32), pytest.approx(0.35))
    assert minus["median_interval"] == pytest.approx([0.05, 0.5])
    assert [row["seed"] for row in minus["by_seed"]] == [0, 1, 2, 3, 4]
    assert minus["by_seed"][1]["interval_95"] == pytest.approx([0.25, 0.35])
    assert "grpo_minus" not in found["A"]["greedy"]["grpo"]
    shown = capsys.readouterr().out
    assert "GRPO and its controls, on the same held-out problems" in shown
    for words in ("rejection sampling", "supervised steps", "+0.350", "(+0.05, +0.50)", "0: +0.40 (+0.35, +0.45)"):
        assert words in shown


def test_two_seeds_have_no_interval_and_runs_without_controls_no_table(make, capsys):
    runs = [make("a0"), make("a1", seed=1)]
    assert main(["compare", *map(str, runs)]) == 0
    assert "GRPO and its controls" not in capsys.readouterr().out
    assert compare(runs).controls == {}
    for run in runs:
        write_control(run, control_result())
    rejection = compare(runs).controls["A"]["sampled"]["rejection"]
    assert rejection.differences == pytest.approx([0.1, 0.1])


def test_the_interval_is_newcombes():
    """His example (1998, table II a): 48 of 80 against 56 of 70, method 11."""
    low, high = difference_interval(48 / 80, 56 / 70, (80, 70))
    assert (round(low, 4), round(high, 4)) == (0.0428, 0.3422)


def _evaluations(first: float, last: float, name: str = "eval/accuracy") -> list[dict]:
    ends = [{"step": step, name: value, "eval/prompts": 512} for step, value in ((0, first), (60, last))]
    return [ends[0], {"step": 30, "reward/mean": 0.5}, ends[1]]


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [
        (0.637, 0.734, "The difference is +0.097 (95 %: +0.039 to +0.154), so it has learned."),
        (0.734, 0.637, "The difference is -0.097 (95 %: -0.154 to -0.039), so it has become worse."),
        (0.182, 0.184, "The difference is +0.002 (95 %: -0.047 to +0.051), which may be chance."),
    ],
)
def test_the_verdict_follows_from_the_interval(first, last, verdict):
    [sentence] = headline(_evaluations(first, last))
    assert sentence.startswith(f"Held out, sampled: accuracy {first} at step 0, {last} at step 60, on 512 problems. ")
    assert sentence.endswith(verdict)


def test_sampled_and_greedy_have_a_sentence_each():
    rows = [row | {"eval/accuracy_greedy": 0.5} for row in _evaluations(0.4, 0.6)]
    assert [sentence[:18] for sentence in headline(rows)] == ["Held out, sampled:", "Held out, greedy: "]


def test_a_mean_reward_has_no_interval():
    [sentence] = headline(_evaluations(-0.5, 3.0, "eval/reward_mean"))
    assert "mean reward -0.500 at step 0, 3.000 at step 60" in sentence
    assert "+3.500; it has no interval" in sentence


def test_completions_without_a_mark_leave_no_interval_and_no_verdict():
    """Nobody knows then over how many problems the accuracy is a mean."""
    for end in (0, 2):
        rows = _evaluations(0.2, 0.6)
        rows[end]["eval/unscored"] = 460
        [sentence] = headline(rows)
        assert sentence.endswith("The difference is +0.400; it has no interval, since some completions have no mark.")


def test_a_run_that_has_just_begun_promises_nothing():
    assert headline([]) == []
    [sentence] = headline(_evaluations(0.4, 0.6)[:2])
    assert sentence.endswith("accuracy 0.400 at step 0, on 512 problems. There is no later evaluation yet.")


def test_without_evaluations_training_is_all_there_is():
    rows = [{"step": step, "reward/mean": step / 100} for step in range(1, 41)]
    assert headline(rows) == [
        "In training: mean reward 0.055 in the first 10 steps, 0.355 in the last. Nothing was held out."
    ]
