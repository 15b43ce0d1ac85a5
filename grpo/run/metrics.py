"""The one table of metric names, and the metrics that rollouts and their scores give."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from statistics import pstdev

from grpo.algorithm.ties import tied
from rewards.group_score import GroupScore, mean
from rollout.depth import draft_gain, tokens_per_forward
from rollout.group import Completion, DraftStats, RolloutGroup

# <d> stands for a number, <name> for any name. A value covers one step unless its row says otherwise.
METRICS: dict[str, str] = {
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
    "curriculum/open": "training examples that are open yet (curriculum.shortest_share), fraction",
    "curriculum/seen": "training examples that were drawn at least once, fraction",
    "curriculum/pass_rate": "running share of a prompt's marked completions with full marks, mean over the prompts met",
    "curriculum/draft_depth": "depth to which the draft head is unrolled at this step",
    "completion/tokens": "completion tokens sampled, stop tokens included, count; without what tools wrote",
    "completion/length_mean": "length of a completion, stop token included, mean, tokens",
    "completion/length_max": "length of the longest completion, tokens",
    "completion/clipped": "completions cut by max_completion_tokens (finish_reason length), fraction",
    "completion/out_of_turns": "completions cut by max_turns (finish_reason max_turns), fraction; with tools",
    "completion/aborted": "completions whose sampling was given up (finish_reason abort), fraction",
    "tools/turns_mean": "turns of the policy in a completion, mean; with an agent its answers",
    "tools/calls_mean": "calls of tools that were made in a completion, mean; with an agent its requests",
    "tools/errors": "calls at which the tool raised, and the policy was told so, fraction of the calls; with an agent "
    "requests that got no answer",
    "tools/bad_calls": "turns in which a call named no tool, had wrong arguments or could not be read, fraction",
    "tools/failures": "completions whose environment or agent could not go on (late, died, not a number), count",
    "tools/tokens": "tokens that tools or an agent wrote, which nothing is learned from, count",
    "agent/segments_mean": "texts that an episode of an agent consists of, mean (absent where each is one that begins "
    "with the prompt of the data)",
    "loss/total": "what the optimizer minimises for the policy: every term with its weight",
    "loss/policy": "policy term of the loss, by the chosen loss_type",
    "loss/kl": "KL of the policy from the reference, before beta, mean, nats per token",
    "loss/teacher_kl": "KL of the policy from the teacher (loss.advantage: distill), mean, nats per token: "
    "an estimate, or with distill.top_k the KL of the teacher's k tokens and the rest",
    "loss/mtp": "loss of the draft head over its depths, detached from the trunk; nats per token",
    "loss/mtp_tv": "the same by total variation (mtp.tv, quartet mtp): share of drafts rejected at best, fraction",
    "loss/value": "loss of the value head (PPO baseline), mean per token, squared score",
    "loss/balance_entropy": "log E - H(mean soft choice), before its weight, mean over layers, nats; 0 is balanced",
    "loss/balance_sequence": "balance loss of a completion, before its weight, mean over layers; 1 is balanced",
    "loss/balance_heads_entropy": "the same as loss/balance_entropy, of dynamic heads (active_heads)",
    "loss/balance_heads_sequence": "the same as loss/balance_sequence, of dynamic heads (active_heads)",
    "loss/own": "the loss that a loop of your own gave to forward_backward, as it is summed up",
    "loss/sft": "cross-entropy of the gold solutions in the warm start, mean, nats per token",
    "policy/entropy": "entropy of the sampling policy, nats per token: the mean of -log-probability of what it sampled",
    "policy/step_kl": "how far the step moved the policy: KL of the one before it from the one after (k3 estimate), on "
    "one completion of each of the first eight groups that were learned from, mean, nats per token",
    "policy/ratio_mean": "importance ratio of policy to old policy, mean over tokens, 1 when on-policy",
    "policy/clip_fraction": "tokens whose ratio the clip holds back, fraction",
    "policy/clip_fraction_low": "tokens held back at the lower bound, fraction",
    "policy/clip_fraction_high": "tokens held back at the upper bound, fraction",
    "value/clip_fraction": "tokens whose value the clip holds back, fraction",
    "value/explained_variance": "1 - Var(return - value) / Var(return) over tokens; 1 is a perfect value function",
    "value/grad_norm": "norm of the value head's gradient before clipping",
    "mismatch/logprob_abs_mean": "|learner's - sampler's log-probability| of the sampled tokens, mean, nats; what is "
    "more than canary/* comes from age",
    "mismatch/logprob_abs_max": "the largest of them",
    "mismatch/kl": "KL of the sampler from the learner (k3 estimate), mean, nats per token",
    "mismatch/age_mean": "versions between the sampler and the learner, mean over tokens (absent at 0)",
    "mismatch/weight_mean": "importance correction of the sampler's mismatch, mean over tokens",
    "draft/acceptance_depth_<d>": "drafts accepted at depth d / drafts made at depth d",
    "draft/drafted_depth_<d>": "drafts made at depth d, count",
    "draft/tokens_per_forward": "completion tokens after the first / decoding forwards of the trunk; 1 without drafts",
    "draft/gain": "what the tokens cost without drafts / what their rounds cost, both by draft_costs.json and of all "
    "draws; 1 where none was drafted, absent where no table chooses how many: with a number as rollout.draft_tokens, "
    "an agent, vLLM, or nothing to draft from",
    "rollout/tail": "forwards of a shard in which an eighth of its completions or fewer were still decoded, fraction, "
    "mean over the shards of the first draw",
    "draft/vocabulary_coverage": "sampled tokens that are in the trimmed draft vocabulary, fraction",
    "corpus/taught_tokens": "tokens that this step has kept for the head to learn from (quartet mtp), count",
    "corpus/held_out_tokens": "the same of rollouts that tell what an epoch gains, and are not learned from, count",
    "draft/heldout_acceptance_depth_<d>": "drafts at depth d that the trunk would have taken in those rollouts "
    "after an epoch / chains of that depth (quartet mtp)",
    "draft/heldout_tokens_per_forward": "1 + the sum of draft/heldout_acceptance_depth_<d>",
    "draft/head_age": "steps that TRL's trainer has taken since the MTP head was last trained (TRL bridge only), count",
    "draft/fallback_rate": "forwards that fell back to plain decoding / forwards of the trunk",
    "moe/load_min": "load of the least used expert / even share, mean over layers; 1 is balanced",
    "moe/load_max": "load of the most used expert / even share, mean over layers; 1 is balanced",
    "moe/max_violation": "moe/load_max - 1",
    "moe/router_entropy": "entropy of a token's gate, mean over tokens and layers, nats; log E is indifference",
    "moe/dead_experts": "experts that no token of the step chose, over all layers, count",
    "moe/layer_<d>/load_min": "moe/load_min of layer d alone",
    "moe/layer_<d>/load_max": "moe/load_max of layer d alone",
    "moe/layer_<d>/max_violation": "moe/max_violation of layer d alone",
    "moe/layer_<d>/router_entropy": "moe/router_entropy of layer d alone",
    "moe/layer_<d>/dead_experts": "moe/dead_experts of layer d alone",
    "faults/worker": "Ray workers that died or were late (rollout.timeout_s, rollout.publish_timeout_s), and were "
    "replaced; as all faults/* since the last line, and absent at 0, count",
    "faults/node": "Ray workers that were replaced since their machine left the cluster, count",
    "faults/object_store": "times that Ray's object store was full and was waited for, count",
    "faults/vllm": "servers of vLLM that died or hung (rollout.vllm.silence_s, rollout.publish_timeout_s), and were "
    "started again, count",
    "faults/sampling_seconds": "from the start of what these have lost to its being done again, seconds",
    "faults/reward_worker": "processes of reward functions that died or passed reward.timeout_s, count",
    "faults/reward_seconds": "from the start of what they scored to its being scored again or given up, seconds",
    "alarm/length/<name>": "correlation of the marks of `name` with length inside groups; alarms look at five steps",
    "alarm/repetition/<name>": "the same with the share of 3-grams of tokens that a completion had before",
    "alarm/copied/<name>": "the same with: the answer is a number of the question, and wrong",
    "alarm/right/<name>": "the same with being right, where the data have gold answers of numbers",
    "alarm/format/<name>": "wrong completions among those with the best mark of `name`; only where nine of ten "
    "well-formed ones have it; fraction",
    "alarm/identical": "completions whose text another prompt got too, fraction",
    "canary/logprob_abs_mean": "the same of a publication's canaries, which both score with the same weights: what "
    "precision and backend alone give, nats",
    "canary/logprob_abs_max": "the largest of them",
    "canary/repeats": "1 where a publication's first canaries differed by more than is allowed, and its second did not",
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
    "time/draft_head": "the draft head and its loss, without most of its backward; and all that tied groups take which "
    "are read for it alone; part of time/learn, seconds",
    "time/wait": "waiting for the batch that is sampled ahead; part of time/learn but for the first, seconds",
    "time/publish": "handing the new weights to the sampler, seconds",
    "time/canaries": "sampling the canaries, scoring them, comparing digests; part of time/publish, seconds",
    "time/confirm": "from the message to the last worker's confirmation; part of time/publish, seconds",
    "time/evaluate": "held-out evaluation, off the training clock, seconds",
    "time/checkpoint": "writing a checkpoint, seconds",
    "speed/completion_tokens_per_second": "completion tokens / time/rollout",
    "speed/taught_tokens_per_second": "tokens of an epoch that the head has learned from / seconds (quartet mtp)",
    "eval/accuracy": "held-out completions that the first reward calls right, fraction; only where it says so",
    "eval/accuracy_greedy": "the same for greedy completions, fraction",
    "eval/reward_mean": "score of a held-out completion, mean",
    "eval/reward_mean_greedy": "the same for greedy completions, mean",
    "eval/part/<name>": "value of the reward function `name` on held-out completions, mean",
    "eval/pass_at_<d>": "held-out prompts that at least one of d completions solves, fraction",
    "eval/majority_at_<d>": "held-out prompts whose most frequent answer among d completions is right, fraction",
    "eval/without_mark": "held-out completions without a mark (the reward abstained or failed), count",
    "eval/reward_errors": "failures of reward functions on held-out completions, count",
    "eval/prompts": "held-out prompts evaluated, count",
    "eval/completion_length_mean": "length of a held-out completion, stop token included, mean, tokens",
    "eval/completion_clipped": "held-out completions cut by max_completion_tokens, fraction",
    "eval/acceptance_depth_<d>": "draft/acceptance_depth_<d> on held-out prompts (quartet mtp)",
    "eval/tokens_per_forward": "draft/tokens_per_forward on held-out prompts",
    "run/interruptions": "times that the run was stopped or interrupted before this step (absent at 0), count",
    "run/failures": "times that an error ended it before this step, such as a reward that raised (absent at 0), count",
    "run/killed": "times that it ended before this step without a word, as for want of memory (absent at 0), count",
    "run/finished": "for trackers, at the end: 1 where the run came to its end, 0 where it was stopped or failed",
    "log/not_finite": "metrics of this step that were NaN or infinite, written as null, count",
}
METRICS |= {
    name.replace("moe/", "heads/"): f"the same as {name}, of the attention heads that active_heads lets a router choose"
    for name in METRICS
    if name.startswith("moe/")
}


_PATTERNS = {row: re.compile(re.escape(row).replace("<d>", r"\d+").replace("<name>", ".+")) for row in METRICS}


def check(name: str) -> str:
    """The row of METRICS that documents `name`. Raises ValueError with the nearest name if there is none.

    >>> check("draft/acceptance_depth_3")
    'draft/acceptance_depth_<d>'
    """
    if found := next((pattern for pattern, regex in _PATTERNS.items() if regex.fullmatch(name)), None):
        return found
    nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0)[0]
    raise ValueError(f"metric {name!r} is not documented; did you mean {nearest!r}? METRICS has all names")


def table() -> str:
    """METRICS as a Markdown table."""
    rows = (f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in METRICS.items())
    return "\n".join(["| metric | meaning |", "|---|---|", *rows]) + "\n"


def rollout_metrics(groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> dict[str, float]:
    """What one step's P groups and their P GroupScores say: reward/*, group/*, completion/* and draft/*.

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
    for name in sorted({name for score in scores for name in score.parts}):
        parts = (part for score in scores for part in score.parts.get(name, []) if part is not None)
        metrics[f"reward/part/{name}"] = mean_of(parts)
    for name in sorted({name for score in scores for name in score.metrics}):
        metrics[f"reward/metric/{name}"] = mean_of(score.metrics[name] for score in scores if name in score.metrics)
    if forwards:
        metrics["draft/tokens_per_forward"] = tokens_per_forward(completions)
        metrics["draft/gain"] = draft_gain(completions)
        metrics["draft/fallback_rate"] = sum(draft.fallbacks for draft in drafts) / forwards
    metrics |= _acceptance(drafts)
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


def _acceptance(drafts: Sequence[DraftStats]) -> dict[str, float]:
    """How many drafts were made at each depth, and what share of them was accepted."""
    counts = [[draft.drafted for draft in drafts], [draft.accepted for draft in drafts]]
    drafted, accepted = ([sum(at) for at in zip_longest(*by_depth, fillvalue=0)] for by_depth in counts)
    metrics: dict[str, float] = {}
    for depth, (made, hits) in enumerate(zip(drafted, accepted, strict=True), start=1):
        if made:
            metrics[f"draft/drafted_depth_{depth}"] = made
            metrics[f"draft/acceptance_depth_{depth}"] = hits / made
    return metrics


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
    }


def mean_of(values: Iterable[float]) -> float | None:
    """None of none."""
    values = list(values)
    return mean(values) if values else None
