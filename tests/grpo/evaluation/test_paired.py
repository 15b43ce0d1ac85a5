"""Paired differences: numbers by hand, coverage by simulation, and what common noise gains on real policies."""

import json
import math
import random
from statistics import variance

import pytest

from grpo.cli import main
from grpo.data.leakage import TRAINED_ON, problem_fingerprint
from grpo.evaluation.paired import paired_difference


def test_by_hand():
    """d = 1, 0, 0, 0: mean .25, Var .25, half a width 1.96 · √(.25 / 4) = .49; (1/3 + 1/4) / (1/4) = 7/3."""
    found = paired_difference([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    assert (found.value, found.problems) == (0.25, 4)
    assert (found.low, found.high) == pytest.approx((-0.24, 0.74))
    assert found.unpaired == pytest.approx(7 / 3)


def test_without_variation_there_is_no_ratio():
    found = paired_difference([0.25, 0.5], [0.5, 0.75])
    assert (found.value, found.low, found.high, found.unpaired) == (0.25, 0.25, 0.25, None)
    assert paired_difference([0.0], [1.0]).high == math.inf
    with pytest.raises(ValueError, match="no problem in common"):
        paired_difference([], [])


def test_the_interval_holds_the_difference_and_the_ratio_is_what_unpaired_would_need():
    """Two policies of known accuracy with one uniform for both, against each with its own, 2,000 times."""
    chance, inside, spreads = random.Random(0), 0, {"common": [], "own": []}
    first, second, ratios = 0.5, 0.6, []
    for _ in range(2000):
        noise = [chance.random() for _ in range(200)]
        a = [float(u < first) for u in noise]
        found = paired_difference(a, [float(u < second) for u in noise])
        inside += found.low <= second - first <= found.high
        spreads["common"].append(found.value)
        spreads["own"].append(paired_difference(a, [float(chance.random() < second) for _ in a]).value)
        ratios.append(found.unpaired)
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)
    measured = variance(spreads["own"]) / variance(spreads["common"])
    assert sum(ratios) / 2000 == pytest.approx(measured, rel=0.1)


def test_two_policies_are_compared_problem_by_problem(micro_policy, tmp_path, capsys):
    for name, seed in ("a", 0), ("b", 1):
        micro_policy(seed).save(tmp_path / name)
    (tmp_path / "reward.py").write_text("def even(completions, **_):\n    return [len(c) % 2 for c in completions]\n")
    words = ["--limit", "8", "--samples", "2", "--max_completion_tokens", "6", "--threads", "1", "--levels", "[1]"]
    words += ["--rewards", f"[{{function: '{tmp_path}/reward.py:even'}}]", "--output", str(tmp_path / "kept")]
    models = [str(tmp_path / name) for name in ("a", "b", "a")]
    assert main(["eval", *models, *words, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "problem by problem" in shown
    found = json.loads((tmp_path / "out.json").read_text())
    assert [each["model"] for each in found["models"]] == models
    sampled = [each["evaluations"]["sampled"]["accuracy"] for each in found["models"]]
    other, same = found["against_first"]
    assert other["sampled"]["value"] == pytest.approx(sampled[1] - sampled[0])
    assert (same["sampled"]["value"], same["greedy"]["low"], same["sampled"]["unpaired"]) == (0, 0, None)
    lines = [(tmp_path / f"kept{part}/completions.jsonl").read_text() for part in ("", "/1", "/2")]
    assert lines[0] == lines[2] != lines[1]


def test_a_wrong_name_is_an_error_before_anything_is_evaluated(micro_policy, tmp_path, capsys):
    micro_policy(0).save(tmp_path / "a")
    assert main(["eval", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr()
    assert "nowhere" in said.err
    assert said.out == "loading torch and transformers ...\n"


def test_contract_16_what_a_later_policy_was_trained_on_is_refused_before_the_first_is_evaluated(
    micro_policy, tmp_path, capsys
):
    for name in "ab":
        micro_policy(0).save(tmp_path / name)
    problem = {"question": "Tom has 3 apples. How many?", "answer": "#### 3"}
    (tmp_path / "data.jsonl").write_text(json.dumps(problem) + "\n")
    fingerprint = problem_fingerprint(problem["question"])
    (tmp_path / "b" / TRAINED_ON).write_text(f"{fingerprint}\n")
    words = ["--data", str(tmp_path / "data.jsonl"), "--max_completion_tokens", "4", "--threads", "1"]
    assert main(["eval", str(tmp_path / "a"), str(tmp_path / "b"), *words]) == 1
    said = capsys.readouterr()
    assert "trained on" in said.err
    assert "accuracy" not in said.out
    assert main(["eval", str(tmp_path / "a"), *words]) == 0
