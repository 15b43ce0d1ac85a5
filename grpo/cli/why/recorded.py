"""A step of a run as its record has it: the groups and scores that the learner has learned from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.config.json_file import expecting
from grpo.config.options import load
from grpo.config.run import TrainConfig
from grpo.config.yaml_file import read_yaml
from grpo.run.records import read_rollouts, rollout_path, split_groups
from grpo.task.task import Task
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup, Segment, ToolStats


def read_config(run: Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Returns the configuration of the run in this folder, and over it `overrides` by dotted key.

    Raises FileNotFoundError for a folder that holds no run, ValueError for a run that cannot be explained.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"RUN={run} is no run folder: it has no config.yaml")
    if "head" in (tree := read_yaml(file)[0]) or "loss" not in tree:
        raise ValueError(f"RUN={run} is no run of quartet train, whose steps alone learn from groups; name one that is")
    config = load(TrainConfig, file, {"output_dir": run} | (overrides or {}), on_removed=lambda text: None)
    if config.learner.routing_replay:
        raise ValueError(
            f"learner.routing_replay: {run} learned with the experts that the sampler chose, and its record does not "
            "have them, so that its steps cannot be made again; explain a run with learner.routing_replay: false"
        )
    return config


def read_groups(
    run: Path, step: int, task: Task, policy: Policy, data: str
) -> tuple[list[RolloutGroup], list[GroupScore]]:
    """Returns the groups of a step in the order in which they were learned from, each with its recorded rewards.

    The tokens of prompts are not recorded: they come from the `data` of the run, by prompt id. Raises FileNotFoundError
    where the step has no record, ValueError where that is damaged or the data have changed.
    """
    path, tokenizer = rollout_path(run, step), policy.tokenizer
    groups, scores = [], []
    examples = {example.example_id: example for example in task.train}
    for lines in split_groups(read_rollouts(run, step)):
        first = lines[0]
        example = examples.get(first["prompt_id"])
        prompt = None if example is None else task.prompt(example, tokenizer)
        if prompt is not None:
            prompt = task.actor.begun(prompt, first.get("messages"), tokenizer, policy.stop_token_ids)
        if prompt is None or prompt.text != first["prompt"]:
            what = "is not there" if prompt is None else "has another text"
            raise ValueError(
                f"{path}: the data ({data}) have changed since the run: its prompt {first['prompt_id']!r} "
                f"{what} now; put the data back that the run was trained on"
            )
        with expecting(path, "record of a step"):
            groups.append(_group(prompt, lines))
            scores.append(_score(lines))
            if len(lines) != len(groups[0].completions):
                raise ValueError(
                    f"prompt {first['prompt_id']!r} has {len(lines)} completions, and the first one has "
                    f"{len(groups[0].completions)}"
                )
    return groups, scores


def _group(prompt: Prompt, lines: Sequence[dict[str, Any]]) -> RolloutGroup:
    if bad := [line["sample"] for line in lines if not _is_scored(line)]:
        raise ValueError(f"sample {bad[0]} of {prompt.prompt_id!r} has not one log-probability for each token")
    completions = [
        Completion(
            [int(token) for token in line["token_ids"]],
            [float(value) for value in line["logprobs"]],
            line["text"],
            line["finish_reason"],
            int(line["policy_version"]),
            DraftStats(**line.get("draft", {})),
            turns=line.get("turns", []),
            sampled=line.get("sampled", []),
            tools=ToolStats(**line["tools"]) if line.get("tools") else None,
            versions=line.get("policy_versions", []),
            segments=[Segment(**segment) for segment in line.get("segments", [])],
        )
        for line in lines
    ]
    return RolloutGroup(prompt, completions)


def _is_scored(line: dict[str, Any]) -> bool:
    """Every token has a log-probability. Only an agent that has failed may have no tokens."""
    failed = (line.get("tools") or {}).get("failure")
    return len(line["logprobs"]) == len(line["token_ids"]) and bool(line["token_ids"] or failed)


def _score(lines: Sequence[dict[str, Any]]) -> GroupScore:
    rewards = [line["reward"] for line in lines]
    return GroupScore(rewards, {name: [line["parts"][name] for line in lines] for name in lines[0]["parts"]})
