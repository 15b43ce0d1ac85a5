"""Held-out evaluation and the speed of sampling: the same engine and the same scoring as training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from rich.console import Console
from rich.progress import Progress

from grpo.config import DataOptions
from grpo.console import progress_bars
from grpo.inference_config import EvalConfig
from grpo.loader import load_policy, sampling_params
from grpo.task import Task
from rollout.group import Completion, Prompt, RolloutGroup, tokens_per_forward
from rollout.pool import Pool, open_pool
from rollout.sampling import SamplingParams

OnFinished = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out prompts. `correct` are completions with full marks from the first reward
    function: 1, or what a gold solution gets where that is more.

    `completions` are those that it gave a mark; it abstained from `abstained` others, or failed on them.
    """

    prompts: int
    completions: int
    abstained: int
    correct: int
    reward_mean: float
    length_mean: float
    clipped: float
    tokens_per_forward: float
    seconds: float
    tokens_per_second: float
    groups: list[RolloutGroup]

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.completions, 1)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.completions)


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927); sensible near 0 and 1, unlike p ± z·√(p(1−p)/n).

    >>> [round(bound, 3) for bound in wilson_interval(1, 10)]
    [0.018, 0.404]
    """
    if trials == 0:
        return 0.0, 1.0
    p, n = hits / trials, trials
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def evaluate(
    pool: Pool,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    prompts_per_batch: int = 64,
    on_finished: OnFinished | None = None,
) -> Evaluation:
    """Sample `sampling.group_size` completions of every prompt and score them."""
    groups: list[RolloutGroup] = []
    started = time.perf_counter()
    for i in range(0, len(prompts), prompts_per_batch):
        groups += pool.sample(prompts[i : i + prompts_per_batch], sampling, on_finished)
    seconds = time.perf_counter() - started
    scores = task.score(groups)
    completions = [completion for group in groups for completion in group.completions]
    marks = [mark for score in scores for mark in score.parts[task.first_reward]]
    rewards = [reward for score in scores for reward in score.rewards if reward is not None]
    tokens = sum(len(completion.token_ids) for completion in completions)
    return Evaluation(
        prompts=len(prompts),
        completions=len(marks) - marks.count(None),
        abstained=marks.count(None),
        correct=sum(mark is not None and mark >= task.full_marks for mark in marks),
        reward_mean=fmean(rewards) if rewards else 0.0,
        length_mean=tokens / len(completions),
        clipped=fmean(completion.finish_reason == "length" for completion in completions),
        tokens_per_forward=tokens_per_forward(completions) or 1.0,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        groups=groups,
    )


def evaluate_both_ways(
    pool: Pool,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    prompts_per_batch: int,
    progress: Progress,
) -> dict[str, Evaluation]:
    """`sampled` at the sampling temperature and `greedy`, with noise that is the same at every evaluation."""
    bar = progress.add_task("evaluating", total=(sampling.group_size + 1) * len(prompts))

    def advance(ended: int) -> None:
        progress.advance(bar, ended)

    greedy = replace(sampling, temperature=0.0, group_size=1)
    return {
        name: evaluate(pool, task, prompts, params.at(0), prompts_per_batch, advance)
        for name, params in (("sampled", sampling), ("greedy", greedy))
    }


def as_metrics(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """The results of `evaluate_both_ways` under their names in metrics.jsonl."""
    sampled, greedy = results["sampled"], results["greedy"]
    return {
        "eval/accuracy": sampled.accuracy,
        "eval/accuracy_greedy": greedy.accuracy,
        "eval/reward_mean": sampled.reward_mean,
        "eval/prompts": sampled.prompts,
        "eval/completion_length_mean": sampled.length_mean,
        "eval/completion_clipped": sampled.clipped,
        "eval/tokens_per_forward": sampled.tokens_per_forward,
        "time/evaluate": sampled.seconds + greedy.seconds,
    }


def evaluate_model(config: EvalConfig, console: Console) -> dict[str, Evaluation]:
    """`quartet eval`: everything about the data is checked before the policy is loaded."""
    data = DataOptions(
        name=config.data,
        levels=config.levels,
        prompt_column=config.prompt_column,
        solution_column=config.solution_column,
        template=config.template,
        system_prompt=config.system_prompt,
        few_shot=config.few_shot,
    )
    with Task(
        data,
        config.rewards,
        config.reward,
        seed=config.seed,
        train=False,
        heldout=config.limit,
        heldout_split=config.split,
    ) as task:
        policy = load_policy(config)
        prompts = [task.prompt(example, policy.tokenizer) for example in task.heldout]
        sampling = sampling_params(policy, config, config.samples, config.seed)
        pool = open_pool(policy, prompts_per_shard=config.prompts_per_batch)
        with progress_bars(console, enabled=True) as progress:
            return evaluate_both_ways(pool, task, prompts, sampling, config.prompts_per_batch, progress)


@dataclass(frozen=True)
class Speed:
    """Completion tokens per second with drafts and without, at one number of rows."""

    rows: int
    draft_tokens: int
    with_drafts: float
    without_drafts: float
    tokens_per_forward: float

    @property
    def gain(self) -> float:
        return self.with_drafts / self.without_drafts


def measure_speed(
    pool: Pool, prompts: Sequence[Prompt], sampling: SamplingParams, rows: Sequence[int], repeats: int = 5
) -> list[Speed]:
    """The same prompts with and without drafts, in turn, median of `repeats`; the tokens are the same by contract 3."""
    speeds = []
    for count in rows:
        rates: dict[int, list[float]] = {0: [], sampling.draft_tokens: []}
        completions: list[Completion] = []
        for repeat in range(repeats):
            chosen = [prompts[(repeat * count + i) % len(prompts)] for i in range(count)]
            for depth in rates:
                params = replace(sampling, draft_tokens=depth, group_size=1)
                started = time.perf_counter()
                groups = pool.sample(chosen, params)
                seconds = time.perf_counter() - started
                sampled = [completion for group in groups for completion in group.completions]
                rates[depth].append(sum(len(completion.token_ids) for completion in sampled) / seconds)
                completions += sampled if depth else []
        with_drafts, without = median(rates[sampling.draft_tokens]), median(rates[0])
        speeds.append(Speed(count, sampling.draft_tokens, with_drafts, without, tokens_per_forward(completions) or 1.0))
    return speeds
