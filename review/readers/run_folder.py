"""What the folder of a run holds: its metrics and what they mean, its events and its held-out problems."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from rewards.config.json_file import expecting, read_objects, whole_lines
from rewards.records import is_metric
from rewards.verdicts import held_out_metric

TURNS = ("begin", "resume", "end")  # events; the last of them says whether a run goes on
CONTROL = "control/control.json"  # in a run folder: what `quartet control` found
HELD_OUT = "held_out.jsonl"
ENVIRONMENT = "environment.json"  # hardware, versions and command of the start
CONTROL_FROM_BEGINNING = "supervised_whole"  # the control that begins before the SFT stage, so it has its seconds too


def check_run(folder: Path) -> Path:
    """The folder itself. Raises ValueError for one that holds no run."""
    if not folder.is_dir():
        raise ValueError(f"RUN={folder}: there is no such folder")
    if not (folder / "metrics.jsonl").is_file():
        inner = next(folder.glob("*/metrics.jsonl"), None)
        way_out = f"one of the runs in it, such as {inner.parent}" if inner else "the output_dir of a run"
        raise ValueError(f"RUN={folder}: is no run folder (no metrics.jsonl in it); name {way_out}")
    return folder


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """One dict a step, steps ascending; the eval/* line of a step is merged into it.

    >>> read_metrics(Path("runs/demo"))[1]
    {'step': 1, 'completion/length_mean': 23.1, ..., 'eval/accuracy': 0.46}
    """
    steps: dict[int, dict[str, Any]] = {}
    path = output_dir / "metrics.jsonl"
    for line in measured_rows(path, whole_lines(path)):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def read_events(output_dir: Path) -> list[dict[str, Any]]:
    """The events of a run in their order. Lines that are no event (of a writer that was killed) are left out."""
    path = output_dir / "events.jsonl"
    events = []
    for line in whole_lines(path) if path.exists() else []:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        events += [event] if isinstance(event, dict) and "event" in event else []
    return events


def read_problems(output_dir: Path, metric: str) -> dict[int, dict[str, float | None]]:
    """What each held-out problem got by `metric`, by step and prompt_id: of the evaluations that have a record, which
    are the first and the last one. Of several records of a step the last one counts. Raises ValueError for a damaged
    file."""
    from review.readers.old_metrics import new_metric

    path = output_dir / HELD_OUT
    if not path.is_file():
        return {}
    with expecting(path, "record of held-out problems"):
        lines = read_objects(path, whole_lines(path))
        return {int(line["step"]): dict(line["by_problem"]) for line in lines if new_metric(line["metric"]) == metric}


def holds_a_run(output_dir: Path) -> bool:
    """A folder where a run was refused or failed before its first step holds none."""
    metrics = output_dir / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or (output_dir / "checkpoints").exists()


def is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)


def measured_rows(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, with the metrics' names of today. Raises ValueError naming the line that holds no
    step, or what is no number."""
    from review.readers.old_metrics import with_new_names

    rows = read_objects(path, lines)
    for number, row in enumerate(rows, start=1):
        if type(step := row.get("step")) is not int or not 0 <= step < 1e9:
            raise ValueError(f"{path}, line {number} is damaged: its step is {step!r:.60}; remove the line")
        if wrong := [name for name, value in row.items() if not is_metric(value)]:
            fault = f"{wrong[0]!r:.60} is {row[wrong[0]]!r:.60}, no finite number"
            raise ValueError(f"{path}, line {number} is damaged: {fault}; remove the line")
    return [with_new_names(row) for row in rows]


def best_step(lines: Sequence[Mapping[str, Any]], saved: Collection[int], window: int | None = None) -> int | None:
    """The step of `saved` that did best on held-out problems, the latest of equals; None where none was evaluated.

    By eval/accuracy, or by eval/reward_mean where the reward's marks do not say right or wrong. With a `window`: by
    reward/mean, on average over so many steps up to it. `lines`: `read_metrics`.

    >>> best_step([{"step": 1, "eval/accuracy": 0.5}, {"step": 2, "eval/accuracy": 0.4}], saved=[1, 2])
    1
    """
    name = held_out_metric(lines) if window is None else "reward/mean"
    known = {line["step"]: line[name] for line in lines if line.get(name) is not None}
    values = {}
    for step in saved:
        near = [known[s] for s in range(step - (window or 1) + 1, step + 1) if s in known]
        if near:
            values[step] = fmean(near)
    return max(values, key=lambda step: (values[step], step), default=None)


# <d> stands for a number, <name> for any name. A value covers one step unless its row says otherwise.
METRICS = {
    "reward/mean": "score of a completion, mean over those that have one; the weights' unit",
    "reward/std": "standard deviation (over n) of the scores inside a group, mean over groups with a score",
    "reward/part/<name>": "value of the reward function `name`, unweighted, mean over completions with one",
    "reward/metric/<name>": "what a reward function reported under `name`, mean over groups",
    "reward/abstained": "completions without a score (abstained, or dropped after a failure), fraction",
    "reward/errors": "failures of reward functions (raised, timed out, not a finite number), count",
    "group/zero_variance": "zero-variance groups: all scores equal up to rounding, or fewer than two; they teach "
    "nothing; fraction",
    "group/dropped": "groups taken out because a reward failed (reward.on_error: drop_group), count",
    "group/resampled": "zero-variance groups replaced by another group (dynamic sampling), count",
    "group/drawn": "groups sampled, resampled ones included, count",
    "completion/tokens": "completion tokens sampled, stop tokens included, count; without what tools wrote",
    "completion/length_mean": "length of a completion, stop token included, mean, tokens",
    "completion/length_max": "length of the longest completion, tokens",
    "completion/truncated": "completions truncated at max_completion_tokens (finish_reason length), fraction",
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
    "policy/approx_kl": "approximate KL of the policy before the step from the policy after it (k3 estimate), on one "
    "completion of each of the first eight groups that were learned from, mean, nats per token",
    "policy/ratio_mean": "importance ratio of policy to old policy, mean over tokens, 1 when on-policy",
    "policy/clip_fraction": "tokens whose ratio the clip holds back, fraction",
    "policy/clip_fraction_low": "tokens held back at the lower bound, fraction",
    "policy/clip_fraction_high": "tokens held back at the upper bound, fraction",
    "mismatch/logprob_abs_mean": "train-inference mismatch: mean |learner's - sampler's log-probability|, nats; "
    "larger than sync_check/* if the weights are older",
    "mismatch/logprob_abs_max": "the largest of them",
    "mismatch/kl": "train-inference mismatch: KL of the sampler from the learner (k3 estimate), mean, nats per token",
    "mismatch/age_mean": "staleness: versions between the sampler and the learner, mean over tokens (absent at 0)",
    "mismatch/weight_mean": "importance weight that corrects the train-inference mismatch, mean over tokens",
    "draft/acceptance_depth_<d>": "drafts accepted at depth d / drafts made at depth d",
    "draft/drafted_depth_<d>": "drafts made at depth d, count",
    "draft/tokens_per_forward": "completion tokens after the first / decoding forwards of the base model; 1 without "
    "drafts",
    "draft/gain": "cost of the tokens without drafts / of their rounds, by draft_costs.json and of all draws; 1 where "
    "none was made, absent where no table chooses how many: rollout.draft_tokens a number, vLLM, no MTP head",
    "rollout/tail": "forwards of a shard in which an eighth of its completions or fewer were still decoded, fraction, "
    "mean over the shards of the first draw",
    "draft/fallback_rate": "forwards that fell back to plain decoding / forwards of the base model",
    "faults/reward_worker": "processes of reward functions that died or passed reward.timeout_s; as all faults/* since "
    "the last line, and absent at 0, count",
    "faults/reward_seconds": "from the start of what they scored to its being scored again or given up, seconds",
    "sync/bytes": "weights sent to the rollout workers since the last line, one copy for each node, bytes",
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
    "time/sync": "weight sync: sending the new weights to the sampler, and its check; seconds",
    "time/checkpoint": "writing a checkpoint, seconds",
    "speed/completion_tokens_per_second": "completion tokens / time/rollout",
    "run/interruptions": "times that the run was stopped or interrupted before this step (absent at 0), count",
    "run/failures": "times that an error ended it before this step, such as a reward that raised (absent at 0), count",
    "run/killed": "times that it ended before this step without a word, as for want of memory (absent at 0), count",
    "run/finished": "for trackers, at the end: 1 where the run came to its end, 0 where it was stopped or failed",
    "log/not_finite": "metrics of this step that were NaN or infinite, written as null, count",
    "eval/accuracy": "held-out completions that the first reward calls correct, fraction; only if it says so",
    "eval/accuracy_greedy": "the same for greedy completions, fraction",
    "eval/reward_mean": "score of a held-out completion, mean",
    "eval/reward_mean_greedy": "the same for greedy completions, mean",
    "eval/part/<name>": "value of the reward function `name` on held-out completions, mean",
    "eval/source/<name>/accuracy": "eval/accuracy of one of several sources of data, by its first reward",
    "eval/source/<name>/reward_mean": "eval/reward_mean of that source",
    "eval/source/<name>/length_mean": "eval/completion_length_mean of that source, tokens",
    "eval/pass_at_<d>": "held-out prompts that at least one of d completions solves, fraction",
    "eval/majority_at_<d>": "held-out prompts whose most frequent answer among d completions is correct, fraction",
    "eval/unscored": "held-out completions without a score (the reward abstained or failed), count",
    "eval/reward_errors": "failures of reward functions on held-out completions, count",
    "eval/prompts": "held-out prompts evaluated, count",
    "eval/completion_length_mean": "length of a held-out completion, stop token included, mean, tokens",
    "eval/completion_truncated": "held-out completions truncated at max_completion_tokens, fraction",
    "eval/tokens_per_forward": "draft/tokens_per_forward on held-out prompts",
    "time/evaluate": "held-out evaluation, off the training clock, seconds",
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
