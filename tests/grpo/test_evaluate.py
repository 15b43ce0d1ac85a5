from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from grpo import evaluate as evaluation
from grpo.config import DataOptions, RewardOptions, ScoringOptions
from grpo.evaluate import (
    Evaluation,
    as_metrics,
    evaluate,
    evaluate_model,
    measure_speed,
    wilson_interval,
)
from grpo.inference_config import EvalConfig, defaults_of_run
from grpo.metrics import check
from grpo.options import load
from grpo.task import Task
from grpo.train import Trainer
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
    data = DataOptions(levels=[1], limit=4)
    return Task(data, rewards or [RewardOptions(function="gsm8k")], ScoringOptions(on_error=on_error))


@pytest.mark.parametrize(
    ("hits", "trials", "expected"),
    [(1, 10, (0.0179, 0.4042)), (0, 20, (0.0, 0.1611)), (20, 20, (0.8389, 1.0)), (50, 100, (0.4038, 0.5962))],
)
def test_the_interval_is_wilsons(hits, trials, expected):
    """Against the roots of (p - hits/trials)² = z² p (1 - p) / trials, which define it, and published values."""
    low, high = wilson_interval(hits, trials)
    assert (low, high) == pytest.approx(expected, abs=1e-4)
    for p in (low, high):
        assert (p - hits / trials) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / trials, abs=1e-12)


def test_nothing_tried_is_nothing_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_an_evaluation_counts_what_was_sampled():
    pool = FakePool([_completion("#### 42", 4), _completion("#### 41", 6, "length", forwards=3)])
    heard = []
    with _task(RewardOptions(function="gsm8k", weight=0.5), RewardOptions(function="gsm8k_format")) as task:
        result = evaluate(pool, task, _prompts(5), SAMPLING, prompts_per_batch=2, on_finished=heard.append)
    assert [count for count, _ in pool.asked] == [2, 2, 1]
    assert heard == [4, 4, 2]
    assert (result.prompts, result.completions, result.correct, result.abstained) == (5, 10, 5, 0)
    assert result.accuracy == 0.5
    assert result.interval == wilson_interval(5, 10)
    assert result.reward_mean == pytest.approx((1.5 + 1.0) / 2)  # weighted; `correct` is the first function's mark
    assert result.length_mean == 5.0
    assert result.clipped == 0.5
    assert result.tokens_per_forward == (3 + 5) / (2 + 3)  # first tokens come from the prefill
    assert result.tokens_per_second == pytest.approx(50 / result.seconds)
    assert len(result.groups) == 5


def test_contract_6_a_completion_without_a_mark_is_not_counted_as_wrong(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def own(completions, **_):\n"
        "    if 'fail' in completions:\n"
        "        raise ValueError('boom')\n"
        "    return [None if c == 'abstain' else float(c == '#### 42') for c in completions]\n"
    )
    texts = ("#### 42", "fail", "abstain", "#### 41")
    pool = FakePool([_completion(text) for text in texts])
    with _task(RewardOptions(function=f"{path}:own"), on_error="drop_sample") as task:
        result = evaluate(pool, task, _prompts(3), replace(SAMPLING, group_size=4))
    assert (result.completions, result.correct, result.abstained) == (6, 3, 6)
    assert result.accuracy == 0.5


def test_metrics_of_an_evaluation_are_documented():
    result = Evaluation(2, 2, 0, 1, 0.5, 4.0, 0.0, 2.0, 1.0, 8.0, [])
    metrics = as_metrics({"sampled": result, "greedy": replace(result, correct=2)})
    assert (metrics["eval/accuracy"], metrics["eval/accuracy_greedy"]) == (0.5, 1.0)
    assert metrics["time/evaluate"] == 2.0
    assert all(check(name) for name in metrics)


def test_speed_is_measured_in_turn_with_the_same_prompts(monkeypatch):
    """A clock of our own: without drafts a call takes 4 s, with them 1, 2, 3, 2 and 9 s; medians are taken."""
    now, drafted = [0.0], iter([1.0, 2.0, 3.0, 2.0, 9.0])

    class TimedPool(FakePool):
        def sample(self, prompts, params, on_finished=None):
            now[0] += next(drafted) if params.draft_tokens else 4.0
            self.asked.append(([prompt.prompt_id for prompt in prompts], params))
            return super().sample(prompts, params, on_finished)

    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    pool = TimedPool([_completion("", 13, forwards=4)])
    [speed] = measure_speed(pool, _prompts(3), SAMPLING, rows=[2])
    assert (speed.without_drafts, speed.with_drafts, speed.gain) == (26 / 4, 26 / 2, 2.0)
    assert (speed.rows, speed.draft_tokens, speed.tokens_per_forward) == (2, 3, 3.0)
    asked = [asked for asked in pool.asked if isinstance(asked[0], list)]
    assert [params.draft_tokens for _, params in asked] == [0, 3] * 5
    assert [ids for ids, _ in asked[:4]] == [["p/0", "p/1"]] * 2 + [["p/2", "p/0"]] * 2
    assert {params.group_size for _, params in asked} == {1}


# ---- `quartet eval` -------------------------------------------------------------------------------------------------


def _same_results(a: Evaluation, b: Evaluation) -> bool:
    timed = {"seconds", "tokens_per_second", "groups"}
    tokens = [[c.token_ids for group in result.groups for c in group.completions] for result in (a, b)]
    return tokens[0] == tokens[1] and all(
        value == getattr(b, name) for name, value in vars(a).items() if name not in timed
    )


@pytest.fixture(scope="module")
def trained(micro_config, tmp_path_factory):
    """The folder of a run with nothing at its default that decides what is evaluated, and its summary."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    given = {
        "seed": 3,
        "steps": 1,
        "data.levels": [1, 2],
        "data.template": "Q: {question}\nA: ",
        "data.few_shot": 1,
        "eval.limit": 5,
        "eval.levels": [1, 2],
        "rollout.temperature": 0.8,
    }
    return folder, Trainer(micro_config(folder, **given)).run()


def test_a_run_folder_brings_its_held_out_problems_along(trained):
    """`quartet eval RUN` meets the problems, prompts and noise of the run's own last evaluation."""
    folder, summary = trained
    config = load(EvalConfig, None, defaults_of_run(folder) | {"model": str(folder), "threads": 1})
    assert config.template == "Q: {question}\nA: "
    assert config.limit == 5
    results = evaluate_model(config, Console(quiet=True))
    for name in ("sampled", "greedy"):
        assert _same_results(results[name], summary["evaluations"][f"after GRPO, {name}"])
    assert results["sampled"].groups[0].prompt.text.count("Q: ") == 2  # the worked example is there


def test_levels_and_split_of_the_evaluation_win_over_those_of_training(micro_config, tmp_path):
    given = {"steps": 1, "eval.limit": 4, "eval.levels": [2], "data.levels": [1]}
    Trainer(micro_config(tmp_path / "r", **given)).run()
    config = load(EvalConfig, None, defaults_of_run(tmp_path / "r") | {"model": str(tmp_path / "r"), "threads": 1})
    groups = evaluate_model(config, Console(quiet=True))["greedy"].groups
    assert [group.prompt.columns["level"] for group in groups] == [2] * 4


def test_drafts_never_change_an_evaluation(trained):
    folder, _ = trained
    base = defaults_of_run(folder) | {"model": str(folder), "threads": 1}
    results = [
        evaluate_model(load(EvalConfig, None, base | given), Console(quiet=True))
        for given in ({"draft_tokens": 0}, {"draft_tokens": 3}, {"prompts_per_batch": 2})
    ]
    for other in results[1:]:
        for name in ("sampled", "greedy"):
            a, b = results[0][name], other[name]
            assert _same_results(replace(a, tokens_per_forward=0), replace(b, tokens_per_forward=0))


def test_several_samples_a_problem(trained):
    folder, _ = trained
    config = load(EvalConfig, None, defaults_of_run(folder) | {"model": str(folder), "threads": 1, "samples": 3})
    results = evaluate_model(config, Console(quiet=True))
    assert results["sampled"].completions == 15
    assert results["greedy"].completions == 5


def test_a_folder_that_is_no_run_brings_nothing(tmp_path):
    assert defaults_of_run(tmp_path) == {}


def test_evaluation_leaves_the_policy_alone(trained):
    from policies.policy import Policy

    folder, _ = trained
    before = Policy.load(folder / "policy").state_dict()
    evaluate_model(
        load(EvalConfig, None, defaults_of_run(folder) | {"model": str(folder), "threads": 1}), Console(quiet=True)
    )
    after = Policy.load(folder / "policy").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
