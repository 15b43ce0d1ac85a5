"""Evaluations of pools that answer as told, and paired differences: numbers by hand, coverage by simulation, and what
common noise gains on real policies."""

import json
import math
import random
from dataclasses import replace
from itertools import product
from statistics import variance
from types import SimpleNamespace

import pytest
from rich.console import Console

from grpo.cli.commands.eval_report import pairs, show_paired
from grpo.cli.parse import main
from grpo.config.run import EvalOptions, LogOptions
from grpo.data.trained_on import TRAINED_ON
from grpo.evaluation.evaluate import Evaluation, as_metrics, evaluate, failure_kinds
from grpo.evaluation.held_out import HeldOut
from grpo.run.log import RunLog
from grpo.task.task import Task
from review.readers.run_folder import check, read_metrics, read_problems
from review.statistics.estimates import estimate, wilson_interval
from review.statistics.gain import held_out_gain
from review.statistics.paired import paired_difference
from rewards import RewardError
from rewards.config.data import SourceOptions
from rewards.config.json_file import write_json
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.data.leakage import problem_fingerprint
from rollout.faults import RolloutError
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup
from rollout.sampling import SamplingParams

SAMPLING = SamplingParams(group_size=2, draft_tokens=3, stop_token_ids=(0,))


def _completion(text: str, length: int = 4, reason: str = "stop", forwards: int = 2) -> Completion:
    return Completion([1] * length, [-0.5] * length, text, reason, 0, DraftStats(forwards))


class FakePool:
    """Answers every prompt with given completions, and remembers how it was asked."""

    def __init__(self, completions: list[Completion]) -> None:
        self.completions, self.asked = completions, []

    def sample(self, prompts, params, on_finished=None):
        self.asked.append((len(prompts), params))
        if on_finished:
            on_finished(len(prompts) * params.group_size)
        return [RolloutGroup(prompt, self.completions[: params.group_size]) for prompt in prompts]


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p/{i}", "6 * 7 = ?\n", [5], {"question": "6 * 7 = ?", "answer": "#### 42"}) for i in range(count)]


def _task(*rewards: RewardOptions, on_error: str = "abort") -> Task:
    data = SourceOptions(task_options={"levels": [1]}, limit=4)
    return Task(data, rewards or [RewardOptions(function="gsm8k")], ScoringOptions(on_error=on_error))


def _evaluated(*completions: Completion, prompts: int = 2, **options) -> Evaluation:
    """By gsm8k, of a pool that answers each prompt with these."""
    with _task() as task:
        return evaluate(FakePool([*completions]), task, _prompts(prompts), replace(SAMPLING, **options))


class PoolOfBrokenWeights(FakePool):
    """Logits are not finite for the prompts in `broken`."""

    def __init__(self, completions: list[Completion], broken: set[str]) -> None:
        super().__init__(completions)
        self.broken = broken

    def sample(self, prompts, params, on_finished=None):
        groups = super().sample(prompts, params, on_finished)
        lost = [group.prompt.prompt_id for group in groups if group.prompt.prompt_id in self.broken]
        for group in groups:
            if group.prompt.prompt_id in lost:
                group.completions = [_completion("", 1, "abort")] * params.group_size
        if lost:
            raise RolloutError(f"not finite: {lost}", groups)
        return groups


@pytest.mark.parametrize(
    ("broken", "batches", "scored"), [({"p/1", "p/4"}, 3, ["p/0", "p/2", "p/3"]), ({"p/2", "p/3"}, 2, ["p/0", "p/1"])]
)
def test_prompts_that_cannot_be_sampled_cost_no_other_one(broken, batches, scored):
    """The others are scored and handed on; a batch without any sample ends it, for there the weights are gone."""
    pool, heard = PoolOfBrokenWeights([_completion("#### 42")], broken), []
    params = replace(SAMPLING, group_size=1)
    with _task() as task, pytest.raises(RolloutError) as caught:
        evaluate(pool, task, _prompts(5), params, 2, on_batch=lambda *batch: heard.extend(zip(*batch, strict=True)))
    assert all(name in str(caught.value) for name in broken)
    assert len(pool.asked) == batches
    assert [group.prompt.prompt_id for group, _ in heard] == scored
    assert all(score.rewards == [1.0] for _, score in heard)
    assert [group.prompt.prompt_id for group in caught.value.groups] == scored


def test_an_evaluation_counts_what_was_sampled():
    pool = FakePool([_completion("#### 42", 4), _completion("#### 41", 6, "length", forwards=3)])
    heard = []
    with _task(RewardOptions(function="gsm8k", weight=0.5), RewardOptions(function="gsm8k_format")) as task:
        result = evaluate(pool, task, _prompts(5), SAMPLING, prompts_per_batch=2, on_finished=heard.append)
    assert [count for count, _ in pool.asked] == [2, 2, 1]
    assert heard == [4, 4, 2]
    assert (result.prompts, result.completions, result.correct, result.without_mark) == (5, 10, 5, 0)
    assert result.accuracy == 0.5
    same_everywhere = estimate([0.5] * 5)  # each problem was solved by one of its two completions
    assert result.interval == (same_everywhere.low, same_everywhere.high)
    assert result.reward_mean == pytest.approx((1.5 + 1.0) / 2)  # weighted; `correct` is the first function's mark
    assert result.parts == {"gsm8k": 0.5, "gsm8k_format": 1.0}
    assert result.length_mean == 5.0
    assert result.clipped == 0.5
    assert result.tokens_per_forward == (3 + 5) / (2 + 3)  # first tokens come from the prefill
    assert result.tokens_per_second == pytest.approx(50 / result.seconds)
    assert len(result.groups) == 5


def test_one_completion_a_problem_has_the_wilson_interval_and_the_policys_own_tokens_count():
    """What tools or the user write is not the policy's."""
    answer = replace(_completion("#### 42", 10), sampled=[True] * 2 + [False] * 8)
    result = _evaluated(answer, prompts=7, group_size=1)
    assert result.length_mean == 2.0
    assert result.tokens_per_second == pytest.approx(14 / result.seconds)
    assert result.interval == pytest.approx(wilson_interval(7, 7))


def test_pass_at_k_and_majorities_of_several_samples():
    """Of every four completions one is right, in third place, and two agree on the same wrong number."""
    said = ("#### 7", "#### 7.0", "#### 42", "no idea")
    result = _evaluated(*(_completion(text) for text in said), prompts=3, group_size=4)
    assert {k: passed.value for k, passed in result.pass_at.items()} == {1: 0.25, 2: 0.5, 4: 1.0}
    assert {passed.problems for passed in result.pass_at.values()} == {3}
    # of 1: a wrong number twice, the right one, none; of 2: 7 against 42; of 4: 7
    assert {k: vote.value for k, vote in result.majority_at.items()} == {1: 0.25, 2: 0.5, 4: 0.0}
    assert result.accuracy == result.pass_at[1].value
    metrics = as_metrics({"sampled": result, "greedy": result})
    assert (metrics["eval/pass_at_2"], metrics["eval/majority_at_4"]) == (0.5, 0.0)
    assert "eval/pass_at_1" not in metrics


def test_drafts_and_fallbacks_are_summed_over_completions():
    drafted = [DraftStats(4, [4, 4], [3, 1], fallbacks=1), DraftStats(6, [6, 6, 6], [5, 3, 3], fallbacks=2)]
    result = _evaluated(*(replace(_completion("#### 42"), draft=draft) for draft in drafted))
    one_token = replace(_completion("#### 42", 1), draft=DraftStats(0, [0, 0], [0, 0]))
    plain = _evaluated(one_token, one_token)
    assert result.acceptance == [8 / 10, 4 / 10, 3 / 6]
    assert result.fallback_rate == 3 / 10
    assert (plain.acceptance, plain.fallback_rate, plain.tokens_per_forward) == ([], 0.0, 1.0)


OWN = """
def own(completions, **_):
    if "fail" in completions:
        raise ValueError("boom")
    return [None if c == "abstain" else float(c == "#### 42") for c in completions]
"""


@pytest.fixture
def own(tmp_path) -> RewardOptions:
    """A reward that abstains, and raises."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return RewardOptions(function=f"{path}:own")


def test_contract_6_a_completion_without_a_mark_is_not_counted_as_wrong(own):
    pool = FakePool([_completion(text) for text in ("#### 42", "fail", "abstain", "#### 41")])
    with _task(own, on_error="drop_sample") as task:
        result = evaluate(pool, task, _prompts(3), replace(SAMPLING, group_size=4))
    assert (result.completions, result.correct) == (6, 3)
    assert (result.without_mark, result.abstained) == (6, 3)
    assert result.accuracy == 0.5
    assert replace(result, by_problem=[1.0, 0.0, None]).accuracy == 0.5  # of problems, as the interval is
    assert (result.pass_at[2].value, result.pass_at[2].problems) == (1.0, 3)  # of the two that have a mark
    assert (result.pass_at[4].problems, result.pass_at[4].low, result.pass_at[4].high) == (0, 0.0, 1.0)
    assert failure_kinds(result.failures) == {"own: raised": 3}
    assert {failure.prompt_id for failure in result.failures} == {"p/0", "p/1", "p/2"}
    assert {failure.sample_index for failure in result.failures} == {1}


def test_a_number_that_stands_in_for_a_failure_is_a_mark_and_the_failure_stays_counted(own):
    pool = FakePool([_completion("#### 42"), _completion("fail")])
    with _task(own, on_error="score=0") as task:
        result = evaluate(pool, task, _prompts(2), SAMPLING)
    assert (result.completions, result.correct, result.without_mark, result.abstained) == (4, 2, 0, 0)
    assert failure_kinds(result.failures) == {"own: raised": 2}


def test_every_batch_is_scored_and_handed_on_before_the_next_is_sampled():
    events = []

    class Watched(FakePool):
        def sample(self, prompts, params, on_finished=None):
            events.append(("sampled", [prompt.prompt_id for prompt in prompts]))
            return super().sample(prompts, params, on_finished)

    def handed_on(groups, scores):
        events.append(("scored", [group.prompt.prompt_id for group in groups], [score.rewards for score in scores]))

    pool, sampling = Watched([_completion("#### 42")]), replace(SAMPLING, group_size=1)
    with _task() as task:
        evaluate(pool, task, _prompts(3), sampling, prompts_per_batch=2, on_batch=handed_on)
    assert events == [
        ("sampled", ["p/0", "p/1"]),
        ("scored", ["p/0", "p/1"], [[1.0], [1.0]]),
        ("sampled", ["p/2"]),
        ("scored", ["p/2"], [[1.0]]),
    ]


def test_metrics_of_an_evaluation_are_documented():
    right = _evaluated(_completion("#### 42"), _completion("#### 41"))
    greedy = replace(right, by_problem=[1.0, 1.0], seconds=0.5)
    metrics = as_metrics({"sampled": replace(right, seconds=1.5), "greedy": greedy})
    assert (metrics["eval/accuracy"], metrics["eval/accuracy_greedy"]) == (0.5, 1.0)
    assert metrics["eval/part/gsm8k"] == 0.5
    assert metrics["time/evaluate"] == 2.0
    assert all(check(name) for name in metrics)


def _held_out(pool, task, options, log) -> HeldOut:
    sampling = replace(SAMPLING, group_size=options.samples)
    held_out = HeldOut(task, SimpleNamespace(tokenizer=None), pool, log, sampling)
    held_out.prompts = _prompts(2)
    return held_out


def _events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_inside_a_run_failures_are_events_and_results_are_metrics(own, tmp_path):
    pool = FakePool([_completion("#### 42"), _completion("fail")])
    folder, options = tmp_path / "run", EvalOptions(samples=2)
    with RunLog(folder, "", LogOptions(trackers=[]), quiet=True) as log:
        with _task(own, on_error="drop_sample") as task:
            for step in (0, 5):
                results = _held_out(pool, task, options, log).evaluate(step)
        assert results["sampled"].without_mark == 2
        rows = [(row["step"], row["eval/accuracy"], row["eval/reward_errors"]) for row in read_metrics(folder)]
        with _task(own) as task, pytest.raises(RewardError, match="boom"):
            _held_out(pool, task, options, log).evaluate(7)
    assert rows == [(0, 1.0, 2), (5, 1.0, 2)]
    failed = [event for event in _events(folder) if event["event"] == "reward_error"]
    found = [(e["step"], e["evaluation"], e["prompt_id"], e["kind"]) for e in failed[:4]]
    assert found == [(step, "sampled", prompt, "raised") for step in (0, 5) for prompt in ("p/0", "p/1")]
    [aborted] = failed[4:]
    assert (aborted["step"], aborted["prompt_id"], aborted["sample_index"]) == (7, "p/0", 1)


def test_a_named_evaluation_records_what_each_problem_got(own, tmp_path):
    """The first and the last one; not those between, and not those of other problems."""
    pool = FakePool([_completion("#### 42"), _completion("#### 41")])
    folder = tmp_path / "run"
    with _task(own) as task, RunLog(folder, "", LogOptions(trackers=[]), quiet=True) as log:
        held_out = _held_out(pool, task, EvalOptions(samples=2), log)
        held_out.evaluate(0, "before")
        held_out.evaluate(5)
        held_out.evaluate(9, "after")
    assert read_problems(folder, "eval/accuracy") == {0: {"p/0": 0.5, "p/1": 0.5}, 9: {"p/0": 0.5, "p/1": 0.5}}
    assert read_problems(folder, "eval/reward_mean") == {}
    gain = held_out_gain(read_metrics(folder), read_problems(folder, "eval/accuracy"))
    assert (gain.value, gain.of, gain.is_paired) == (0.0, "the same 2 problems", True)


def test_by_hand():
    """d = 1, 0, 0, 0: Student's t gives .25 ± 3.182 · √(1/4 / 4). With -1 and 1: mean 1/6, Σd² = 3, variance
    (3 - 6/36) / 5 and 1/6 ± 2.571 · √(.5667 / 6), which reaches farther down than with -1, -1, 1, 1. Nothing is above
    1. (1/3 + 1/4) / (1/4) = 7/3."""
    found = paired_difference([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    assert (found.value, found.problems) == (0.25, 4)
    assert (found.low, found.high) == pytest.approx((1 / 6 - 2.571 * (0.56667 / 6) ** 0.5, 1.0), abs=1e-5)
    assert found.unpaired == pytest.approx(7 / 3)
    assert (found.higher, found.lower, found.points) == (1, 0, (0, 0, 0, 0.25, 1))
    rewards = paired_difference([1.0, 2.0, 3.0], [2.0, 2.0, 4.0], None)
    assert (rewards.low, rewards.high, rewards.unpaired) == (None, None, None)
    assert rewards.why_no_interval.startswith("no interval: rewards have no limits")


def test_what_never_varied_has_an_interval_all_the_same():
    """Three of three: -1 and four times 1 have the mean 3/5 and the variance (5 - 9/5) / 4."""
    found = paired_difference([0.0] * 3, [1.0] * 3)
    assert (found.low, found.high) == pytest.approx((3 / 5 - 2.776 * (4 / 5 / 5) ** 0.5, 1.0))
    assert (found.value, found.unpaired) == (1.0, None)
    tied = paired_difference([1.0] * 20, [1.0] * 20)
    assert tied.value == 0.0
    assert -0.2 < tied.low == -tied.high < -0.1
    one = paired_difference([0.0], [1.0])
    assert (one.low, one.high) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="no problem in common"):
        paired_difference([], [])
    for first, second in ([0.0], [1.0]), ([0.0, 1.0] * 400, [1.0, 1.5] * 400), ([2.0] * 9, [2.0] * 9):
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
    words = ["--eval.limit", "8", "--eval.samples", "2", "--rollout.max_completion_tokens", "6", "--threads", "1"]
    words += ["--data.task_options", "{levels: [1]}"]
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
    assert "+0.500 (none)" in capsys.readouterr().out
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
    words = ["--data.name", str(tmp_path / "data.jsonl"), "--rollout.max_completion_tokens", "4", "--threads", "1"]
    assert main(["eval", str(tmp_path / "a"), str(tmp_path / "b"), *words]) == 1
    said = capsys.readouterr()
    assert "trained on" in said.err
    assert "accuracy" not in said.out
    assert main(["eval", str(tmp_path / "a"), *words]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr()
    assert ("nowhere" in said.err, said.out) == (True, "loading torch and transformers ...\n")
