"""Paired differences: numbers by hand, coverage by simulation, and what common noise gains on real policies."""

import json
import math
import random
from itertools import product
from statistics import variance
from types import SimpleNamespace

import pytest
from rich.console import Console

from grpo.cli.commands.eval_report import pairs, show_paired
from grpo.cli.parse import main
from grpo.data.trained_on import TRAINED_ON
from grpo.evaluation.paired import paired_difference
from rewards.config.json_file import write_json
from rewards.data.leakage import problem_fingerprint


def test_by_hand():
    """d = 1, 0, 0, 0: Student's t gives .25 ± 3.182 · √(1/4 / 4). With -1, -1, 1, 1: mean 1/8, Σd² = 5, variance
    (5 - 8/64) / 7 and .125 ± 2.365 · √(.6964 / 8). Nothing is above 1. (1/3 + 1/4) / (1/4) = 7/3."""
    found = paired_difference([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    assert (found.value, found.problems) == (0.25, 4)
    assert (found.low, found.high) == pytest.approx((0.125 - 2.365 * (0.69643 / 8) ** 0.5, 1.0), abs=1e-5)
    assert found.unpaired == pytest.approx(7 / 3)
    # rewards have no limit: 2/3 ± 4.303 · √(1/3 / 3), and 2/7 ± 2.447 · √(40/7 / 6 / 7) reaches farther down
    rewards = paired_difference([1.0, 2.0, 3.0], [2.0, 2.0, 4.0], None)
    assert (rewards.low, rewards.high) == pytest.approx((2 / 3 - 4.303 / 3, 2 / 3 + 4.303 / 3))


def test_what_never_varied_has_an_interval_all_the_same():
    """Three of three: -1, -1 and five times 1 have the mean 3/7 and the variance (7 - 9/7) / 6."""
    found = paired_difference([0.0] * 3, [1.0] * 3)
    assert (found.low, found.high) == pytest.approx((3 / 7 - 2.447 * (40 / 7 / 6 / 7) ** 0.5, 1.0))
    assert (found.value, found.unpaired) == (1.0, None)
    tied = paired_difference([1.0] * 20, [1.0] * 20)
    assert tied.value == 0.0
    assert -0.2 < tied.low == -tied.high < -0.1
    one = paired_difference([0.0], [1.0])
    assert (one.low, one.high) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="no problem in common"):
        paired_difference([], [])
    for first, second in ([0.0], [1.0]), ([0.0, 1.0], [1.0, 1.0]), ([2.0] * 9, [2.0] * 9):
        found = paired_difference(first, second, None)  # rewards without a scale
        assert (found.low, found.high) == (None, None)


def _coverage(count):
    """The least chance that the interval holds the difference of two policies' accuracies, with marks of 0 and 1: over
    chances of a win and of a loss in steps of .05, every outcome counted by its probability."""
    outcomes = []
    for wins, losses in product(range(count + 1), repeat=2):
        if (ties := count - wins - losses) >= 0:
            found = paired_difference([0.0] * wins + [1.0] * (losses + ties), [1.0] * (wins + ties) + [0.0] * losses)
            ways = math.comb(count, wins) * math.comb(count - wins, losses)
            outcomes.append((wins, losses, ties, ways, found.low - 1e-9, found.high + 1e-9))
    least = 1.0
    for p, q in ((i / 20, j / 20) for i in range(21) for j in range(21 - i)):
        rest = max(0.0, 1 - p - q)
        chances = (n * p**w * q**x * rest**t for w, x, t, n, low, high in outcomes if low <= p - q <= high)
        least = min(least, sum(chances))
    return least


@pytest.mark.parametrize("count", [2, 3, 5, 10, 20])
def test_the_interval_holds_the_difference_of_any_two_policies_on_few_problems(count):
    """The normal interval that was here before holds it in .14, .23, .40 and .64 of all cases with 3, 5, 10 and 20."""
    assert _coverage(count) >= 0.95


def test_of_many_problems_the_interval_is_the_normal_one():
    first = [float(i % 2) for i in range(2000)]
    second = [float(i % 2 or i % 10 == 0) for i in range(2000)]  # d is 1 for a tenth, else 0: Var(d) = .09
    found = paired_difference(first, second)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.09 / 2000) ** 0.5, rel=0.05)


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_policies_are_compared_problem_by_problem(micro_policy, tmp_path, capsys):
    for name, seed in ("a", 0), ("b", 1):
        micro_policy(seed).save(tmp_path / name)
    (tmp_path / "reward.py").write_text("def even(completions, **_):\n    return [len(c) % 2 for c in completions]\n")
    words = ["--limit", "8", "--samples", "2", "--max_completion_tokens", "6", "--threads", "1", "--levels", "[1]"]
    words += ["--rewards", f"[{{function: '{tmp_path}/reward.py:even'}}]", "--output", str(tmp_path / "kept")]
    models = [str(tmp_path / name) for name in ("a", "b", "a")]
    assert main(["eval", *models, *words, "--json", str(tmp_path / "out.json")]) == 0
    assert "problem by problem" in " ".join(capsys.readouterr().out.split())  # a long path breaks the line
    found = json.loads((tmp_path / "out.json").read_text())
    assert [each["model"] for each in found["models"]] == models
    sampled = [each["evaluations"]["sampled"]["accuracy"] for each in found["models"]]
    other, same = found["against_first"]
    assert other["sampled"]["value"] == pytest.approx(sampled[1] - sampled[0])
    assert (same["sampled"]["value"], same["greedy"]["value"], same["sampled"]["unpaired"]) == (0, 0, None)
    assert same["greedy"]["low"] == -same["greedy"]["high"] < 0
    lines = [(tmp_path / f"kept{part}/completions.jsonl").read_text() for part in ("", "/1", "/2")]
    assert lines[0] == lines[2] != lines[1]


def test_one_problem_of_a_reward_that_is_no_verdict_has_an_unknown_interval(tmp_path, capsys):
    """Which was infinite before, and infinity cannot be written as JSON: the command failed after all its work."""
    group = SimpleNamespace(prompt=SimpleNamespace(prompt_id="a/0"))
    results = [SimpleNamespace(interval=None, rewards_by_problem=[mark], groups=[group]) for mark in (0.25, 0.75)]
    first, other = (SimpleNamespace(config=SimpleNamespace(model="a"), results={"greedy": r}) for r in results)
    show_paired(first, [other], Console(width=80))
    assert "+0.500 (unknown)" in capsys.readouterr().out
    write_json(tmp_path / "out.json", {way: vars(found) for way, found in pairs(first, other).items()})
    assert json.loads((tmp_path / "out.json").read_text())["greedy"]["low"] is None


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
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr()
    assert ("nowhere" in said.err, said.out) == (True, "loading torch and transformers ...\n")
