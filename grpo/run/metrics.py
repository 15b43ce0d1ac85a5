"""What metrics mean, and the metrics that rollouts and their scores give."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from statistics import pstdev

from rewards.group_score import GroupScore, mean
from rewards.ties import tied
from rollout.draft_stats import draft_gain, drafts_by_depth, tokens_per_forward
from rollout.group import Completion, RolloutGroup

# <d> stands for a number, <name> for any name. A value covers one step unless its row says otherwise.
METRICS = {
    "reward/mean": "score of a completion, mean over those that have one; the weights' unit",
    "reward/std": "standard deviation (over n) of the scores inside a group, mean over groups with a score",
    "reward/part/<name>": "value of the reward function `name`, unweighted, mean over completions with one",
    "reward/metric/<name>": "what a reward function reported under `name`, mean over groups",
    "reward/abstained": "completions without a score (abstained, or dropped after a failure), fraction",
    "reward/errors": "failures of reward functions (raised, timed out, not a finite number), count",
    "group/tied": "groups whose scores are all equal up to rounding, or fewer than two, fraction; they teach nothing",
    "group/dropped": "groups taken out because a reward failed (reward.on_error: drop_group), count",
    "group/refilled": "tied groups whose place a refill took (dynamic sampling), count",
    "group/drawn": "groups sampled, refills included, count",
    "completion/tokens": "completion tokens sampled, stop tokens included, count; without what tools wrote",
    "completion/length_mean": "length of a completion, stop token included, mean, tokens",
    "completion/length_max": "length of the longest completion, tokens",
    "completion/clipped": "completions cut by max_completion_tokens (finish_reason length), fraction",
    "completion/out_of_turns": "completions cut by max_turns (finish_reason max_turns), fraction; with tools",
    "completion/aborted": "completions whose sampling was given up (finish_reason abort), fraction",
    "tools/turns_mean": "turns of the policy in a completion, mean; with an agent its answers",
    "tools/calls_mean": "calls of tools that were made in a completion, mean; with an agent its requests",
    "tools/errors": "calls at which the tool raised, and the policy was told so, or an agent got no answer; fraction",
    "tools/bad_calls": "turns in which a call named no tool, had wrong arguments or could not be read, fraction",
    "tools/failures": "completions whose environment or agent could not go on (late, died, not a number), count",
    "tools/tokens": "tokens that tools or an agent wrote, which nothing is learned from, count",
    "loss/total": "what the optimizer minimises for the policy: every term with its weight",
    "loss/policy": "policy term of the loss, by the chosen loss_type",
    "loss/kl": "KL of the policy from the reference, before beta, mean, nats per token",
    "policy/entropy": "entropy of the sampling policy, nats per token: the mean of -log-probability of what it sampled",
    "policy/step_kl": "how far the step moved the policy: KL of the one before it from the one after (k3 estimate), on "
    "one completion of each of the first eight groups that were learned from, mean, nats per token",
    "policy/ratio_mean": "importance ratio of policy to old policy, mean over tokens, 1 when on-policy",
    "policy/clip_fraction": "tokens whose ratio the clip holds back, fraction",
    "policy/clip_fraction_low": "tokens held back at the lower bound, fraction",
    "policy/clip_fraction_high": "tokens held back at the upper bound, fraction",
    "mismatch/logprob_abs_mean": "mean |learner's - sampler's log-probability|, nats; age makes it more than canary/*",
    "mismatch/logprob_abs_max": "the largest of them",
    "mismatch/kl": "KL of the sampler from the learner (k3 estimate), mean, nats per token",
    "mismatch/age_mean": "versions between the sampler and the learner, mean over tokens (absent at 0)",
    "mismatch/weight_mean": "importance correction of the sampler's mismatch, mean over tokens",
    "draft/acceptance_depth_<d>": "drafts accepted at depth d / drafts made at depth d",
    "draft/drafted_depth_<d>": "drafts made at depth d, count",
    "draft/tokens_per_forward": "completion tokens after the first / decoding forwards of the trunk; 1 without drafts",
    "draft/gain": "cost of the tokens without drafts / of their rounds, by draft_costs.json and of all draws; 1 where "
    "none was made, absent where no table chooses how many: rollout.draft_tokens a number, vLLM, no draft head",
    "rollout/tail": "forwards of a shard in which an eighth of its completions or fewer were still decoded, fraction, "
    "mean over the shards of the first draw",
    "draft/fallback_rate": "forwards that fell back to plain decoding / forwards of the trunk",
    "faults/reward_worker": "processes of reward functions that died or passed reward.timeout_s; as all faults/* since "
    "the last line, and absent at 0, count",
    "faults/reward_seconds": "from the start of what they scored to its being scored again or given up, seconds",
    "publish/bytes": "weights that the rollout workers got since the last line, one copy for each node, bytes",
    "learner/learning_rate": "learning rate of the policy at this step",
    "learner/grad_norm": "norm of the gradient before clipping",
    "learner/updates": "optimizer updates in this step, count",
    "memory/rss_gib": "resident memory of the learner's process, GiB",
    "memory/device_gib": "peak memory allocated on the accelerator, GiB",
    "time/step": "wall-clock time of the whole step, seconds",
    "time/rollout": "sampling the completions, seconds",
    "time/reward": "scoring them, seconds",
    "time/learn": "log-probabilities, backward and optimizer, seconds",
    "time/wait": "waiting for the batch that is sampled ahead; part of time/learn but for the first, seconds",
    "time/publish": "handing the new weights to the sampler, seconds",
    "time/checkpoint": "writing a checkpoint, seconds",
    "speed/completion_tokens_per_second": "completion tokens / time/rollout",
    "run/interruptions": "times that the run was stopped or interrupted before this step (absent at 0), count",
    "run/failures": "times that an error ended it before this step, such as a reward that raised (absent at 0), count",
    "run/killed": "times that it ended before this step without a word, as for want of memory (absent at 0), count",
    "run/finished": "for trackers, at the end: 1 where the run came to its end, 0 where it was stopped or failed",
    "log/not_finite": "metrics of this step that were NaN or infinite, written as null, count",
}


@cache
def documented() -> dict[str, str]:
    """All metrics with their meaning, area by area: those of every run, then what a feature adds. A file has a table
    METRICS of what it alone writes. It is read and not imported, so that nothing is loaded for the names of metrics."""
    rows, packages = dict(METRICS), Path(__file__).parents[2]
    for file in sorted(path for package in ("grpo", "rollout") for path in (packages / package).rglob("*.py")):
        for table in re.findall(r"^METRICS = (\{.*?\})$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            rows |= ast.literal_eval(table)
    areas = [name.partition("/")[0] for name in rows]
    return dict(sorted(rows.items(), key=lambda row: areas.index(row[0].partition("/")[0])))


def check(name: str) -> str:
    """The row that documents `name`. Raises ValueError with the nearest name if there is none.

    >>> check("draft/acceptance_depth_3")
    'draft/acceptance_depth_<d>'
    """
    for row in documented():
        if re.fullmatch(re.escape(row).replace("<d>", r"\d+").replace("<name>", ".+"), name):
            return row
    nearest = difflib.get_close_matches(name, documented(), n=1, cutoff=0)[0]
    raise ValueError(f"metric {name!r} is not documented; did you mean {nearest!r}? quartet reference has all names")


def meaning(name: str) -> str:
    """Says what a metric means; "" where nothing documents it."""
    try:
        return documented()[check(name)]
    except ValueError:
        return ""


def table() -> str:
    """All metrics as a Markdown table."""
    rows = (f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in documented().items())
    return "\n".join(["| metric | meaning |", "|---|---|", *rows]) + "\n"


def rollout_metrics(groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> dict[str, float]:
    """Measures what one step's P groups and their P GroupScores say: reward/*, group/*, completion/* and draft/*.

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
        "reward/errors": sum(len(score.errors) for score in scores),
        "group/tied": mean_of(tied(score.rewards) for score in scores),
        "group/dropped": sum(score.dropped for score in scores),
        "completion/tokens": sum(lengths),
        "completion/length_mean": mean_of(lengths),
        "completion/length_max": max(lengths, default=None),
        "completion/clipped": mean_of(reason == "length" for reason in reasons),
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
        "agent/segments_mean": mean_of(max(1, len(c.segments)) for c, _ in episodes) if any_segments else None,
        "agent/cached_tokens": sum(completion.cached for completion, _ in episodes) or None,
    }


def mean_of(values: Iterable[float]) -> float | None:
    """Gives the mean; None of no values."""
    values = list(values)
    return mean(values) if values else None
