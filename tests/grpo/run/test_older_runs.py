"""A run as 0.2.0 wrote it, the last release: it resumes, and is evaluated, shown and exported."""

import json
import shutil
from pathlib import Path

import pytest

from grpo.cli.parse import main
from grpo.source.policy_source import find_policy
from policies.policy import Policy
from review.page.run_files import RunFiles
from review.readers.run_folder import read_metrics
from rewards.records import read_rollouts

CASE = Path(__file__).parents[2] / "cases/run_0.2.0"  # stopped after step 2 of 3; step_3.json is what 0.2.0 made next


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(CASE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_an_older_run_goes_on_with_the_step_that_it_would_have_made(folder):
    assert main(["train", "run/config.yaml", "--resume", "auto"]) == 0
    expected = json.loads((folder / "step_3.json").read_text())
    assert [line["token_ids"] for line in read_rollouts(folder / "run", 3)] == expected["token_ids"]
    made = read_metrics(folder / "run")[3]
    assert {name: made[name] for name in expected["metrics"]} == pytest.approx(expected["metrics"], rel=1e-4)
    written = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in written if "reward/mean" in line}
    assert ["policy/step_kl" in line for line in steps.values()] == [True, True, False]
    series = [row["policy/approx_kl"] for row in read_metrics(folder / "run") if "reward/mean" in row]
    assert series == [steps[1]["policy/step_kl"], steps[2]["policy/step_kl"], steps[3]["policy/approx_kl"]]
    assert find_policy("run").step == 3


def test_an_older_checkpoint_is_evaluated(folder, capsys):
    source = find_policy("run")
    assert (source.step, source.base) == (2, "model")
    assert main(["eval", "run", "--json", "found.json", "--eval.limit", "2"]) == 0
    assert json.loads((folder / "found.json").read_text())["evaluations"]["sampled"]["completions"] == 2


def test_an_older_run_is_exported(folder):
    assert main(["export", "run", "exported"]) == 0
    assert Policy.load("exported").mtp is not None


def test_an_older_run_is_shown(folder):
    """The page has its curves under the names of today, and its completions token by token."""
    run = RunFiles(folder / "run")
    overview = run.overview()
    assert overview["recorded"] == [1, 2]
    assert [row["step"] for row in overview["rows"] if "reward/mean" in row] == [1, 2]
    [completion, *_] = run.group(2, 0)["completions"]
    assert len(completion["tokens"]) == len(completion["logprobs"]) > 0
    assert main(["report", "run"]) == 0
    assert '"0/group/2/' in (folder / "run/report.html").read_text(encoding="utf-8")


def test_an_older_run_is_audited_diagnosed_and_compared(folder, capsys):
    for words in (["audit", "run"], ["diagnose", "run"], ["compare", "run", "run"]):
        assert main(words) in (0, 1), words  # 1: it has found something
        assert "Traceback" not in "".join(capsys.readouterr())
