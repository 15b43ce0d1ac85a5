"""What the page, its first sentences and `quartet compare` show of the controls of a run."""

import json
import os
import shutil
from pathlib import Path

import pytest

from grpo.cli.parse import main
from review.page.headline import control_sentences
from review.page.run_files import RunFiles
from review.readers.control_result import read_control
from review.readers.run_folder import CONTROL
from review.statistics.estimates import wilson_interval
from tests.cases.control_results import control_result, from_the_beginning, points, rewards, write_control

CASE = Path(__file__).parents[2] / "cases/run_to_view"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(CASE, tmp_path / "run")


def _sentences(run, result):
    write_control(run, result)
    return control_sentences(read_control(run))


def test_policies_have_the_words_of_the_field_and_seconds_after_the_sft_stage(run):
    write_control(run, control_result())
    found = read_control(run)
    assert {policy.name: policy.seconds for policy in found.policies.values()} == {
        "start (SFT stage)": 0.0,
        "GRPO": 60.0,
        "supervised steps": 61.0,
        "rejection sampling": 59.0,
    }
    supervised = found.policies["supervised"]
    assert (supervised.results["sampled"].value, supervised.results["greedy"].value) == (0.5, 0.51)
    assert supervised.grpo_minus["sampled"].value == pytest.approx(0.4)
    assert found.grpo.grpo_minus == {}


def test_a_point_of_a_curve_has_its_wilson_interval(run):
    write_control(run, control_result())
    last = read_control(run).grpo.curve[-1]
    assert (last.step, last.seconds, last.sampled.value) == (40, 60.0, 0.9)
    assert (last.sampled.low, last.sampled.high) == wilson_interval(0.9 * 512, 512)


def test_a_control_from_the_beginning_is_shifted_by_the_seconds_of_the_sft_stage(run):
    write_control(run, from_the_beginning(control_result()))
    supervised = read_control(run).policies["supervised"]
    assert [answer.seconds for answer in supervised.curve] == [28.0, 57.0]  # 0 and 29 s are before GRPO began
    assert supervised.seconds == 60.0


def test_rewards_without_verdicts_have_no_interval(run):
    write_control(run, control_result(grpo=3.5, of=rewards, half=None))
    found = read_control(run)
    assert not found.is_accuracy
    assert found.grpo.results["sampled"].value == 3.5
    assert found.grpo.curve[-1].sampled.low is None
    write_control(run, control_result() | {"seconds": {"grpo": 60.0, "start": 0}})
    found = read_control(run)
    assert found.policies["start"].name == "start"  # without an SFT stage
    assert not found.has_sft_stage


def test_a_way_that_was_not_asked_for_is_not_shown(run):
    result = control_result()
    for ways in (*result["results"].values(), *result["grpo_minus"].values()):
        del ways["sampled"]
    [first, _] = _sentences(run, result)
    assert first.startswith("GRPO is above the best supervised control by +0.40")
    assert set(read_control(run).grpo.results) == {"greedy"}


def test_the_page_is_told_of_the_control_and_says_it(run):
    assert read_control(run) is None
    overview = RunFiles(run).overview()
    assert overview["control"] is None
    assert not any("GRPO is" in sentence for sentence in overview["headline"])
    write_control(run, control_result())
    overview = RunFiles(run).overview()
    assert overview["control"]["policies"]["rejection"]["curve"][1]["sampled"]["value"] == 0.6
    assert overview["headline"][-2:] == [
        "GRPO is above the best supervised control by +0.40 (95 %: +0.35 to +0.45) on the same 512 problems in the "
        "same seconds.",
        "GRPO is above rejection sampling by +0.10 (95 %: +0.05 to +0.15) on the same 512 problems in the same "
        "seconds.",
    ]


def test_the_sentence_follows_from_the_interval(run):
    below, chance = _sentences(run, control_result(supervised=0.97, rejection=0.88))
    assert below.startswith("GRPO is below the best supervised control: the difference is -0.07 (95 %: -0.12 to -0.02)")
    assert chance.startswith("GRPO minus rejection sampling is +0.02 (95 %: -0.03 to +0.07)")
    assert chance.endswith("; it may be chance.")
    assert "has no interval" in _sentences(run, control_result(of=rewards, half=None))[0]


def test_other_seconds_are_not_called_the_same(run):
    result = control_result()
    result["chosen"]["supervised"]["seconds"] = 80.0
    first, second = _sentences(run, result)
    assert first.endswith("after 60 s of GRPO and 80 s of the control.")
    assert second.endswith("in the same seconds.")


def _without(*keys):
    def change(result):
        inner = result
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return json.dumps(result)

    return change


def _with_point(**changed):
    def change(result):
        return json.dumps(result | {"grpo_curve": [points(0.5)[0] | changed]})

    return change


DAMAGES = {
    "empty": lambda result: "",
    "cut off": lambda result: json.dumps(result)[:-100],
    "a list": lambda result: "[]",
    "another object": lambda result: "{}",
    "deep": lambda result: "[" * 100_000 + "]" * 100_000,
    "without GRPO": _without("results", "grpo"),
    "without a control's difference": _without("grpo_minus", "supervised"),
    "without a control's training": _without("chosen", "rejection"),
    "a word as a number": _with_point(sampled="much"),
    "a nan": _with_point(seconds=float("nan")),
    "null": _with_point(problems=None),
    "results that are a list": lambda result: json.dumps(result | {"results": []}),
    "a number of problems that is none": lambda result: json.dumps(result | {"problems": [512]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_control_is_named_with_a_way_out(run, capsys, damage):
    write_control(run, {}).write_text(DAMAGES[damage](control_result()))
    for command in ("report", "compare"):
        assert main([command, str(run)]) == 1
        message = capsys.readouterr().err
        assert str(run / CONTROL) in message
        assert "`quartet control` writes it again after you remove it" in message
        assert "Traceback" not in message


def test_a_control_that_is_a_pipe_is_not_waited_for(run):
    (run / "control").mkdir()
    os.mkfifo(run / CONTROL)
    with pytest.raises(ValueError, match=r"control.json is no plain file"):
        RunFiles(run).overview()
