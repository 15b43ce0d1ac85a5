"""The metrics that rollouts and their scores give; review/readers/run_folder.py has what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from statistics import pstdev

from rewards.group_score import GroupScore, mean
from rewards.ties import tied
from rollout.draft_stats import draft_gain, drafts_by_depth, tokens_per_forward
from rollout.group import Completion, RolloutGroup


def rollout_metrics(groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> dict[str, float]:
    """Measures what the groups of one step, and the GroupScores of those that have one, say: reward/*, group/*,
    completion/* and draft/*.

    What was not measured is left out: `reward/mean` if all abstained, acceptance without drafts.

    >>> rollout_metrics([group], [score])["reward/mean"]      # score.rewards == [1.0, 0.0, None]
    0.5
    """
    completions = [completion for group in groups for completion in group.completions]
    scored = [[reward for reward in score.rewards if reward is not None] for score in scores]
    lengths = [completion.num_sampled for completion in completions]
    drafts = [completion.draft for completion in completions]
    forwards = sum(draft.target_forwards for draft in drafts)
    reasons = [completion.finish_reason for completion in completions]
    metrics: dict[str, float | None] = {
        "reward/mean": mean_of(reward for rewards in scored for reward in rewards),
        "reward/std": mean_of(pstdev(rewards) for rewards in scored if rewards),
        "reward/abstained": mean_of(reward is None for score in scores for reward in score.rewards),
        "reward/errors": sum(len(score.errors) for score in scores) if scores else None,
        "group/zero_variance": mean_of(tied(score.rewards) for score in scores),
        "group/dropped": sum(score.dropped for score in scores) if scores else None,
        "completion/tokens": sum(lengths),
        "completion/length_mean": mean_of(lengths),
        "completion/length_max": max(lengths, default=None),
        "completion/truncated": mean_of(reason == "length" for reason in reasons),
        "completion/aborted": mean_of(reason == "abort" for reason in reasons),
        "policy/entropy": mean_of(
            -logprob for c in completions for logprob, own in zip_longest(c.logprobs, c.sampled, fillvalue=True) if own
        ),
    } | _tool_metrics(completions)
    if any(completion.segments for completion in completions):
        from rollout.environments.thoughts import costs

        metrics |= costs(groups)
    for name in sorted({name for score in scores for name in score.parts}):
        parts = (part for score in scores for part in score.parts.get(name, []) if part is not None)
        metrics[f"reward/part/{name}"] = mean_of(parts)
    for name in sorted({name for score in scores for name in score.metrics}):
        metrics[f"reward/metric/{name}"] = mean_of(score.metrics[name] for score in scores if name in score.metrics)
    if forwards:
        metrics["draft/tokens_per_forward"] = tokens_per_forward(completions)
        metrics["draft/gain"] = draft_gain(completions)
        metrics["draft/fallback_rate"] = sum(draft.fallbacks for draft in drafts) / forwards
    for depth, (made, accepted) in enumerate(drafts_by_depth(completions), start=1):
        if made:
            metrics[f"draft/drafted_depth_{depth}"] = made
            metrics[f"draft/acceptance_depth_{depth}"] = accepted / made
    return {name: float(value) for name, value in metrics.items() if value is not None}


def tail_share(groups: Sequence[RolloutGroup], prompts_per_shard: int) -> dict[str, float]:
    """rollout/tail of whole shards, which are decoded together from their first token on; none where nothing was
    decoded after the prefill.

    >>> tail_share([group], 1)      # its eight completions took 4, 4, 4, 4, 4, 4, 4 and 16 forwards
    {"rollout/tail": 0.75}
    """
    shares: list[float] = []
    for start in range(0, len(groups), prompts_per_shard):
        shard = groups[start : start + prompts_per_shard]
        forwards = sorted((c.draft.target_forwards for group in shard for c in group.completions), reverse=True)
        few = max(1, len(forwards) // 8)
        if len(forwards) > few and forwards[0]:
            shares.append(1 - forwards[few] / forwards[0])
    return {"rollout/tail": mean(shares)} if shares else {}


def _tool_metrics(completions: Sequence[Completion]) -> dict[str, float | None]:
    """tools/*, where there were tools."""
    episodes = [(completion, completion.tools) for completion in completions if completion.tools is not None]
    if not episodes:
        return {}
    any_segments = any(completion.segments for completion, _ in episodes)
    turns, calls = (sum(n) for n in zip(*((c.num_turns, tools.calls) for c, tools in episodes), strict=True))
    return {
        "completion/out_of_turns": mean_of(completion.finish_reason == "max_turns" for completion, _ in episodes),
        "tools/turns_mean": turns / len(episodes),
        "tools/calls_mean": calls / len(episodes),
        "tools/errors": sum(tools.errors for _, tools in episodes) / calls if calls else None,
        "tools/bad_calls": sum(tools.bad_calls for _, tools in episodes) / turns,
        "tools/failures": sum(tools.failure is not None for _, tools in episodes),
        "tools/tokens": sum(len(completion.token_ids) - completion.num_sampled for completion, _ in episodes),
        "agent/branches_mean": mean_of(max(1, len(c.segments)) for c, _ in episodes) if any_segments else None,
        "agent/cached_tokens": sum(completion.cached for completion, _ in episodes) or None,
    }


def mean_of(values: Iterable[float]) -> float | None:
    """Gives the mean; None of no values."""
    values = list(values)
    return mean(values) if values else None
