"""A run of 0.2 under the names of today: for each reader it is the same run as one with new lines."""

import json
import shutil
from pathlib import Path

import pytest

from review.compare.compare import compare
from review.findings.report import diagnose
from review.page.run_files import RunFiles
from review.readers.old_metrics import OLD_METRICS, new_metric, with_new_names
from review.readers.record import Record
from review.readers.run_folder import documented, read_metrics, read_problems

CASES = Path(__file__).parents[2] / "cases"
OLD = [name.replace("<name>", "mine") for name in OLD_METRICS]
# What each old line of the case is given in addition: values of which diagnose says something.
TELLING = {
    "group/tied": 1.0,
    "policy/step_kl": 1e-9,
    "completion/clipped": 0.9,
    "alarm/length/letters": 0.9,
    "alarm/right/letters": -0.9,
    "canary/repeats": 1.0,
    "source/a/b/tied": 0.5,
}
TOLD_TODAY = {
    "group/zero_variance": 1.0,
    "policy/approx_kl": 1e-9,
    "completion/truncated": 0.9,
    "alarm/length/letters": 0.9,
    "alarm/correct/letters": -0.9,
    "sync_check/repeats": 1.0,
    "source/a/b/zero_variance": 0.5,
}


@pytest.fixture
def folders(tmp_path):
    """The run of 0.2 with old lines, and the same run with new ones."""
    old, new = (Path(shutil.copytree(CASES / "run_0.2.0/run", tmp_path / name / "run")) for name in ("old", "new"))
    lines = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    write(old / "metrics.jsonl", [line | TELLING if "reward/mean" in line else line for line in lines])
    lines = [with_new_names(line) for line in lines]
    write(new / "metrics.jsonl", [line | TOLD_TODAY if "reward/mean" in line else line for line in lines])
    return old, new


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_leads_from_names_that_are_gone_to_names_that_are_documented():
    assert not documented().keys() & OLD_METRICS.keys()
    assert documented().keys() >= set(OLD_METRICS.values())
    for name in OLD:
        assert new_metric(new_metric(name)) == new_metric(name) != name
    for name in (
        "group/dropped",
        "alarm/right/",
        "source//tied",
        "eval/source/tied/accuracy",
        "reward/part/group/tied",
    ):
        assert new_metric(name) == name


def test_a_line_with_both_names_keeps_the_new_value():
    row = {"step": 1, "group/zero_variance": 0.5, "group/tied": 0.25}
    assert with_new_names(row) == {"step": 1, "group/zero_variance": 0.5}
    assert row["group/tied"] == 0.25


def test_metrics_and_held_out_problems_of_an_old_run_are_read_under_the_new_names(folders):
    old, new = folders
    rows = read_metrics(old)
    assert rows == read_metrics(new)
    assert not {name for row in rows for name in row if new_metric(name) != name}
    assert rows[1]["source/a/b/zero_variance"] == 0.5
    write(old / "held_out.jsonl", [{"step": 0, "metric": "eval/accuracy", "by_problem": {"a": 1.0}}])
    assert read_problems(old, "eval/accuracy") == {0: {"a": 1.0}}


def test_an_old_run_is_diagnosed_as_if_it_had_new_names(folders):
    found, expected = (diagnose(Record(folder)) for folder in folders)
    assert found == expected
    assert {"sign-flipped", "clipped"} <= {finding.kind for finding in found}


def test_an_old_run_is_compared_with_a_new_one_by_either_name(folders):
    for name in ("policy/approx_kl", "policy/step_kl"):
        points = compare(folders[:1], [name]).points
        assert {step: point["A"].values for step, point in points["policy/approx_kl"].items()} == {1: [1e-9], 2: [1e-9]}


def test_the_page_of_an_old_run_has_the_curves_of_a_new_one(folders):
    found, expected = (RunFiles(folder).overview() for folder in folders)
    assert (found["rows"], found["meanings"]) == (expected["rows"], expected["meanings"])
    assert all(found["meanings"][name] for name in ("sync_check/repeats", "completion/truncated", "time/sync"))
