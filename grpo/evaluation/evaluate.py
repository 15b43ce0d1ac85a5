"""Held-out evaluation: the same engine and the same scoring as training."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

from rich.progress import Progress

from grpo.run.metrics import mean_of
from grpo.task.task import Task
from review.statistics.estimates import Estimate, estimate, majority_at_k, pass_at_k, powers_of_two
from rewards.group_score import GroupScore, RewardFailure
from rollout.draft_stats import drafts_by_depth, tokens_per_forward
from rollout.faults import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.pool import Sampler
from rollout.sampling import SamplingParams

OnFinished = Callable[[int], None]
OnBatch = Callable[[Sequence[RolloutGroup], Sequence[GroupScore]], None]


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out prompts. `correct` are completions that the first reward function calls right.

    Where its marks do not say right or wrong (see `Verdicts`), `correct`, `accuracy` and `interval` are None, and
    `pass_at` and `majority_at` are empty: `reward_mean` is then the result. It is None where nothing has a score.
    `completions` are those that the first function gave a mark. `without_mark` others count neither as right nor as
    wrong: it abstained from `abstained` of them, and failed on the rest.
    `failures` are those of all reward functions. `interval` is the 95 % interval of the accuracy, over problems (see
    `estimate`). `acceptance[d]` are drafts accepted at depth d + 1 / drafts made there. `by_problem` has for each group
    the share of its completions that are right, without an accuracy their mean reward; None where there is neither.
    """

    prompts: int
    completions: int
    without_mark: int
    abstained: int
    correct: int | None
    interval: tuple[float, float] | None
    reward_mean: float | None
    length_mean: float
    clipped: float
    tokens_per_forward: float
    seconds: float
    tokens_per_second: float
    groups: list[RolloutGroup] = field(repr=False)
    parts: dict[str, float] = field(default_factory=dict)
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    majority_at: dict[int, Estimate] = field(default_factory=dict)
    acceptance: list[float] = field(default_factory=list)
    fallback_rate: float = 0.0
    failures: list[RewardFailure] = field(default_factory=list)
    by_problem: list[float | None] = field(default_factory=list, repr=False)
    rewards_by_problem: list[float | None] = field(default_factory=list, repr=False)

    @property
    def accuracy(self) -> float | None:
        """The mean over problems, as `interval` is of; where all have as many marks, the share of right answers."""
        return None if self.correct is None else mean_of(mark for mark in self.by_problem if mark is not None)

    def without_verdicts(self) -> Evaluation:
        """Leaves out what counts right answers, where the marks turned out to say neither right nor wrong."""
        rewards = self.rewards_by_problem
        return replace(self, correct=None, interval=None, pass_at={}, majority_at={}, by_problem=rewards)


def evaluate(
    pool: Sampler,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    prompts_per_batch: int = 64,
    on_finished: OnFinished | None = None,
    on_batch: OnBatch | None = None,
) -> Evaluation:
    """Sample `sampling.group_size` completions of every prompt and score them, batch by batch.

    If some prompts fail, the others are still evaluated, and RolloutError is raised at the end. It is raised at once
    where a whole batch fails.
    """
    groups: list[RolloutGroup] = []
    scores: list[GroupScore] = []
    faults: list[str] = []
    seconds = 0.0
    for i in range(0, len(prompts), prompts_per_batch):
        started = time.perf_counter()
        try:
            sampled = pool.sample(prompts[i : i + prompts_per_batch], sampling, on_finished)
        except RolloutError as error:
            faults.append(str(error))
            sampled = [g for g in error.groups if all(c.finish_reason != "abort" for c in g.completions)]
            if not sampled:
                break
        seconds += time.perf_counter() - started
        scored = task.score(sampled)
        if on_batch:
            on_batch(sampled, scored)
        groups, scores = groups + sampled, scores + scored
    if faults:
        raise RolloutError("\n".join(faults), groups)
    return _results(task, groups, scores, seconds)


def _results(task: Task, groups: list[RolloutGroup], scores: list[GroupScore], seconds: float) -> Evaluation:
    completions = [completion for group in groups for completion in group.completions]
    judges = [task.part_of(group.prompt.prompt_id) for group in groups]
    marks = [score.parts[judge.first_reward] for judge, score in zip(judges, scores, strict=True)]
    verdicts = [[judge.verdicts.of(mark) for mark in group] for judge, group in zip(judges, marks, strict=True)]
    marked = [[right for right in verdict if right is not None] for verdict in verdicts]
    means = estimate([fmean(right) for right in marked if right])
    rewards = [reward for score in scores for reward in score.rewards if reward is not None]
    failures = [failure for score in scores for failure in score.errors]
    unmarked = sum(group.count(None) for group in marks)
    failed = sum(
        marks[i][failure.sample_index] is None
        for i, score in enumerate(scores)
        for failure in score.errors
        if failure.function == judges[i].first_reward
    )
    tokens = sum(completion.num_sampled for completion in completions)
    drafts = [completion.draft for completion in completions]
    forwards = sum(draft.target_forwards for draft in drafts)
    parts = {
        name: [part for score in scores for part in score.parts[name] if part is not None] for name in scores[0].parts
    }
    ks = powers_of_two(max(len(group.completions) for group in groups))
    result = Evaluation(
        prompts=len(groups),
        completions=len(completions) - unmarked,
        without_mark=unmarked,
        abstained=unmarked - failed,
        correct=sum(map(sum, marked)),
        interval=(means.low, means.high),
        reward_mean=mean_of(rewards),
        length_mean=tokens / len(completions),
        clipped=fmean(completion.finish_reason == "length" for completion in completions),
        tokens_per_forward=tokens_per_forward(completions) or 1.0,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        groups=groups,
        parts={name: fmean(values) for name, values in parts.items() if values},
        pass_at={
            k: estimate([pass_at_k(len(right), sum(right), k) for right in marked if len(right) >= k]) for k in ks
        },
        majority_at={k: _majority(judges, groups, verdicts, k) for k in ks},
        acceptance=[accepted / made for made, accepted in drafts_by_depth(completions) if made],
        fallback_rate=sum(draft.fallbacks for draft in drafts) / forwards if forwards else 0.0,
        failures=failures,
        by_problem=[fmean(right) if right else None for right in marked],
        rewards_by_problem=[mean_of(reward for reward in score.rewards if reward is not None) for score in scores],
    )
    return result if task.verdicts.are_given else result.without_verdicts()


def _majority(
    judges: Sequence[Task], groups: Sequence[RolloutGroup], verdicts: Sequence[list[bool | None]], k: int
) -> Estimate:
    answers = [[judge.read_answer(text) for text in group.texts] for judge, group in zip(judges, groups, strict=True)]
    votes = [majority_at_k(group, verdict, k) for group, verdict in zip(answers, verdicts, strict=True)]
    return estimate([vote for vote in votes if vote is not None])


def both_ways(sampling: SamplingParams) -> dict[str, SamplingParams]:
    """`sampled` as `sampling` says, and `greedy`."""
    return {"sampled": sampling, "greedy": replace(sampling, temperature=0.0, group_size=1)}


def evaluate_ways(
    pool: Sampler,
    task: Task,
    prompts: Sequence[Prompt],
    ways: Mapping[str, SamplingParams],
    prompts_per_batch: int,
    progress: Progress,
    on_batch: Callable[[str, Sequence[RolloutGroup], Sequence[GroupScore]], None] | None = None,
) -> dict[str, Evaluation]:
    """An evaluation for each way of sampling, with noise that is the same at every evaluation."""
    total = sum(params.group_size for params in ways.values()) * len(prompts)
    advance = partial(progress.advance, progress.add_task("evaluating", total=total))
    results = {}
    for way, params in ways.items():
        note = partial(on_batch, way) if on_batch else None
        results[way] = evaluate(pool, task, prompts, params.at(0), prompts_per_batch, advance, note)
    if not task.verdicts.are_given:  # a later way may have shown it
        return {name: result.without_verdicts() for name, result in results.items()}
    return results


def as_metrics(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """The results `sampled` and `greedy` under their names in metrics.jsonl; what there is not is left out."""
    sampled, greedy = results["sampled"], results["greedy"]
    judged = {
        "eval/accuracy": sampled.accuracy,
        "eval/accuracy_greedy": greedy.accuracy,
        "eval/reward_mean": sampled.reward_mean,
        "eval/reward_mean_greedy": greedy.reward_mean,
    }
    metrics = {name: value for name, value in judged.items() if value is not None} | {
        "eval/prompts": sampled.prompts,
        "eval/completion_length_mean": sampled.length_mean,
        "eval/completion_truncated": sampled.clipped,
        "eval/tokens_per_forward": sampled.tokens_per_forward,
        "eval/unscored": sampled.without_mark + greedy.without_mark,
        "eval/reward_errors": len(sampled.failures) + len(greedy.failures),
        "time/evaluate": sampled.seconds + greedy.seconds,
    }
    metrics |= {f"eval/part/{name}": value for name, value in sampled.parts.items()}
    metrics |= {f"eval/pass_at_{k}": passed.value for k, passed in sampled.pass_at.items() if k > 1}
    return metrics | {f"eval/majority_at_{k}": vote.value for k, vote in sampled.majority_at.items() if k > 1}


def source_metrics(task: Task, result: Evaluation) -> dict[str, float]:
    """The metrics of each of several sources of data; a mean over its problems, of which each counts the same."""
    metrics: dict[str, float | None] = {}
    for label, part in task.parts.items():
        places = [i for i, group in enumerate(result.groups) if task.part_of(group.prompt.prompt_id) is part]
        lengths = [completion.num_sampled for i in places for completion in result.groups[i].completions]
        rewards, marks = ([values[i] for i in places] for values in (result.rewards_by_problem, result.by_problem))
        metrics[f"eval/source/{label}/reward_mean"] = mean_of(reward for reward in rewards if reward is not None)
        metrics[f"eval/source/{label}/length_mean"] = mean_of(lengths)
        if result.correct is not None:
            metrics[f"eval/source/{label}/accuracy"] = mean_of(mark for mark in marks if mark is not None)
    return {name: value for name, value in metrics.items() if value is not None}


def failure_kinds(failures: Sequence[RewardFailure]) -> dict[str, int]:
    """Counts how often each reward failed in which way.

    >>> failure_kinds([RewardFailure("mine", "a", 0, "timeout", "no result after 10 s")])
    {'mine: timeout': 1}
    """
    return dict(Counter(f"{failure.function}: {failure.kind}" for failure in failures).most_common())
