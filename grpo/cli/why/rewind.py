"""The learner of a run as it was before a step, as often as that is asked for.

It comes from the nearest checkpoint before the step, or from the start of the run where there is none, and takes the
recorded steps from there again. One process does all of it, whatever the run had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo.cli.why.reading import ReadLearner
from grpo.config.run import TrainConfig
from grpo.learner.batch import TrainingBatch
from grpo.learner.build import grpo_learner
from grpo.learner.update import NonFiniteStep
from grpo.run import checkpoint
from grpo.run.resume import base_changed
from grpo.source.policy_source import holds_head, load_beside, load_policy
from grpo.task.task import Task
from policies.policy import Policy
from rewards.config.data import names_of
from rewards.config.json_file import expecting
from rewards.config.names import recorded_options
from rewards.config.options import load
from rewards.episode import ToolStats
from rewards.group_score import GroupScore
from rewards.records import read_rollouts, rollout_path, split_groups
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup, Segment


def read_config(run: Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Returns the configuration of the run in this folder, and over it `overrides` by dotted key. Raises
    FileNotFoundError or ValueError for a folder that cannot be explained."""
    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"RUN={run} is no run folder: it has no config.yaml")
    if recorded_options(file)[0] != "train":
        raise ValueError(f"RUN={run} is no run of quartet train, whose steps alone learn from groups; name one that is")
    config = load(TrainConfig, file, {"output_dir": run} | (overrides or {}), on_removed=lambda text: None)
    if config.learner.routing_replay:
        raise ValueError(
            f"learner.routing_replay: {run} learned with the experts that the sampler chose, and its record does not "
            "have them, so that its steps cannot be made again; explain a run with learner.routing_replay: false"
        )
    return config


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


LAST = ("loss/", "learner/", "policy/")  # metrics that the learner alone decides


class Rewind:
    """Holds a learner, and takes it back to the state before `step` whenever that is asked for."""

    def __init__(self, config: TrainConfig, step: int, task: Task) -> None:
        """Loads the policy and takes the steps before `step` again. Raises CheckpointError for a damaged checkpoint,
        ValueError where the weights under its adapters are others now, or where a record does not fit the data."""
        self.config, self.step, self.task = config, step, task
        checkpoints = checkpoint.saved(config.output_dir / "checkpoints")
        self.begins = max((other for other in checkpoints if other < step), default=0)  # 0: at the start of the run
        saved = checkpoint.load(checkpoints[self.begins]) if self.begins else None
        self.has_head = saved is not None and holds_head(saved)
        self.learner = self.make()
        if saved:
            if changed := base_changed(self.learner.policy, saved, f"the start of {config.output_dir}"):
                raise ValueError(changed)
            self.learner.load_state(saved.tensors, saved.state["learner"])

    def make(self, other: TrainConfig | None = None, reward_weights: Mapping[str, float] | None = None) -> ReadLearner:
        """Returns a learner at the start of the run, by its configuration or by another one."""
        config = other or self.config
        learned = {"model": str(config.output_dir / "warm_start")} if config.warm_start.steps else {}
        by_us = config.rollout.model_copy(update={"backend": None})  # nothing is sampled, so no server is asked
        began = config.model_copy(update={**learned, "rollout": by_us})
        policy = load_policy(began, self.task.corpus(), head=self.has_head)
        weights = dict(self.task.reward_weights if reward_weights is None else reward_weights)
        learner = grpo_learner(policy, config, weights, load=partial(load_beside, config), kind=ReadLearner)
        assert isinstance(learner, ReadLearner)
        return learner

    @property
    def policy(self) -> Policy:
        return self.learner.policy

    def replay(self, step: int) -> None:
        """Take a recorded step. Runs of version 0.2 could skip one that was not finite: it moved nothing."""
        groups, scores = self.recorded(step)
        with suppress(NonFiniteStep):
            self.take(self.learner, groups, scores, step)

    def recorded(self, step: int) -> tuple[list[RolloutGroup], list[GroupScore]]:
        """Returns the groups of a step in the order in which they were learned from, each with its recorded rewards.
        The tokens of prompts are not recorded: they come from the data of the run, by prompt id. Raises
        FileNotFoundError where the step has no record, ValueError where that is damaged or the data have changed."""
        path, tokenizer = rollout_path(self.config.output_dir, step), self.policy.tokenizer
        groups, scores = [], []
        examples = {example.example_id: example for example in self.task.train}
        for lines in split_groups(read_rollouts(self.config.output_dir, step)):
            first = lines[0]
            example = examples.get(first["prompt_id"])
            prompt = None if example is None else self.task.prompt(example, tokenizer)
            if prompt is not None:
                prompt = self.task.actor.begun(prompt, first.get("messages"), tokenizer, self.policy.stop_token_ids)
            if prompt is None or prompt.text != first["prompt"]:
                what = "is not there" if prompt is None else "has another text"
                raise ValueError(
                    f"{path}: the data ({names_of(self.config.data)}) have changed since the run: its prompt "
                    f"{first['prompt_id']!r} {what} now; put the data back that the run was trained on"
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

    def take(
        self, learner: ReadLearner, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore], step: int
    ) -> dict[str, float]:
        """Takes a step of the learner, as `quartet train` takes it."""
        return learner.step(self.prepare(learner, groups, scores, step))

    def prepare(
        self, learner: ReadLearner, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore], step: int
    ) -> TrainingBatch:
        """Returns the batch of that step."""
        return learner.prepare(groups, scores, step=step)

    def hold(self) -> None:
        """Keep the state as it is now, for `back`."""
        tensors, self._state = self.learner.state()
        self._tensors = {name: {n: t.detach().clone() for n, t in part.items()} for name, part in tensors.items()}

    def back(self, learner: ReadLearner | None = None) -> ReadLearner:
        """Returns the learner in the state that is held; one of `make` in as much of it as it shares. What only the
        other one has stays as at the start: a reference is the policy that the run began with."""
        learner = learner or self.learner
        tensors: dict[str, Mapping[str, Tensor]] = dict(self._tensors)
        if learner is not self.learner:
            fresh: dict[str, Any] = learner.state()[0]
            tensors = {name: part for name, part in (fresh | tensors).items() if name in fresh}
            if "value" not in fresh:
                moments = tensors["optimizer"].items()
                tensors["optimizer"] = {n: moment for n, moment in moments if not n.startswith("value.")}
        learner.load_state(tensors, self._state)
        return learner


def difference(recorded: Mapping[str, Any], again: Mapping[str, float]) -> tuple[int, str, float]:
    """Returns how many metrics of the learner both have, which differs most, and how much of the larger one.

    >>> difference({"loss/policy": 0.5, "time/learn": 3.0}, {"loss/policy": 0.4, "time/learn": 2.0})
    (1, 'loss/policy', 0.2)
    """
    both = [n for n in again if n.startswith(LAST) and isinstance(recorded.get(n), int | float)]
    differences = {n: abs(again[n] - recorded[n]) / max(abs(again[n]), abs(recorded[n]), 1e-6) for n in both}
    worst = max(differences, key=lambda name: differences[name], default="")
    return len(both), worst, differences.get(worst, 0.0)
