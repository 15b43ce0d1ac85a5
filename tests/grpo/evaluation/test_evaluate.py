import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from grpo.algorithm.statistics import estimate, wilson_interval
from grpo.config.run import EvalOptions, LogOptions
from grpo.evaluation.evaluate import Evaluation, as_metrics, evaluate, failure_kinds
from grpo.evaluation.gain import held_out_gain
from grpo.evaluation.held_out import HeldOut
from grpo.run.log import RunLog
from grpo.run.metrics import check
from grpo.run.records import read_metrics, read_problems
from grpo.task.task import Task
from rewards import RewardError
from rewards.config.data import SourceOptions
from rewards.config.reward import RewardOptions, ScoringOptions
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
