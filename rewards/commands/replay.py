"""Recorded completions, of a run or of another tool, scored again with another reward: what would be different?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.commands.options import ReplayConfig
from rewards.commands.recorded import Rollouts
from rewards.config.data import SourceOptions, names_of
from rewards.config.json_file import expecting
from rewards.config.names import recorded_options, sources_of
from rewards.data.examples import load_examples
from rewards.episode import AGENT_REWARD, REWARD, ToolStats, answer_of, environment_reward
from rewards.finding import Report
from rewards.group_score import RewardFailure, mean
from rewards.kinds import NOTE
from rewards.protocol import did_you_mean
from rewards.records import read_rollouts, recorded_steps, split_groups
from rewards.registry import MODEL, find_reward
from rewards.scorer import RewardSpec, Scorer
from rewards.ties import ABSOLUTE, RELATIVE, tied

CHANGES = 8  # of which the table shows the largest
SCORE = "score"  # the weighted sum, not one reward's value


@dataclass(frozen=True)
class Change:
    """The value of one completion is not what was recorded: a case of a finding."""

    step: int
    prompt_id: str
    sample: int
    before: float | None
    after: float | None
    completion: str

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.prompt_id}, sample {self.sample}"

    def as_row(self) -> dict[str, Any]:
        return {"recorded": self.before, "now": self.after, "completion": self.completion}

    @property
    def size(self) -> float:
        """The value moved so far; from or to an abstention counts as the farthest."""
        return float("inf") if self.before is None or self.after is None else abs(self.after - self.before)


@dataclass(frozen=True)
class StepChange:
    """A step has these means over completions with a value, and groups whose values are all equal, before and after."""

    step: int
    completions: int
    before: float | None
    after: float | None
    changed: int
    tied_before: int
    tied_after: int
    groups: int

    def as_row(self) -> dict[str, Any]:
        difference = None if self.before is None or self.after is None else f"{self.after - self.before:+.3f}"
        return {
            "step": self.step,
            "completions": self.completions,
            "recorded": self.before,
            "now": self.after,
            "difference": difference,
            "changed": f"{self.changed / self.completions:.0%}",
            "zero-variance groups": f"{self.tied_before}, now {self.tied_after} of {self.groups}",
        }


@dataclass(kw_only=True)
class Replay(Report):
    """A run was scored again; `changes` are sorted, the largest first."""

    run: str
    function: str
    against: str
    steps: list[StepChange] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    failures: list[RewardFailure] = field(default_factory=list)

    def tell(self) -> None:
        """Says what changed, as findings and tables."""
        self.tables = {"by step": [step.as_row() for step in self.steps]}
        texts = {(change.completion, change.before, change.after): change for change in reversed(self.changes)}
        most = list(reversed(texts.values()))[:CHANGES]
        self.tables["changed most"] = [{"place": change.place} | change.as_row() for change in most]
        completions = sum(step.completions for step in self.steps)
        if self.changes:
            what = f"{len(self.changes)} of {completions} completions score differently"
            self.add("scored-otherwise", what, self.changes, severity=NOTE, cause="", change="")
        if self.failures:
            self.add("reward-fails", f"{len(self.failures)} of {completions} completions failed: {self.failures[0]}")
        self.facts = {"scored": f"{completions} completions of {len(self.steps)} steps"}


def replay(run: Path, function: str, config: ReplayConfig) -> Replay:
    """Scores rollouts with `function`, and leaves them as they are. `run` is a run folder, or a file or folder of
    another tool."""
    find_reward(function)  # a misspelt name must not cost a download
    spec = RewardSpec(function, arguments=config.arguments)
    record = Run(run) if (run / "config.yaml").is_file() else Rollouts(run, config.data)
    if config.steps == []:
        raise ValueError("steps=[]: name a step, or leave the option out for all of them")
    if missing := [step for step in config.steps or [] if step not in record.steps]:
        ends = f"{record.steps[0]} to {record.steps[-1]}"
        raise ValueError(f"steps={config.steps}: {run} has no step {missing[0]}; its steps are {ends}")
    steps = record.steps if config.steps is None else sorted(set(config.steps))
    against = _against(config.against, spec.label, list(record.groups(steps[0])[0][0]["parts"]), record.has_score)
    title = f"{run}: {function} against the recorded {against}"
    result = Replay(title, run=str(run), function=function, against=against)
    with Scorer(
        [spec],
        on_error=config.reward.on_error,
        timeout_s=config.reward.timeout_s,
        columns=record.columns,
        pass_variables=config.reward.pass_variables,
    ) as scorer:
        for step in steps:
            groups = record.groups(step)
            scores = scorer.score(
                [group[0]["prompt"] for group in groups],
                [[record.answer(line) for line in group] for group in groups],
                [record.row(group[0]) for group in groups],
                prompt_ids=[group[0]["prompt_id"] for group in groups],
                completion_ids=[[line["token_ids"] for line in group] for group in groups] if record.has_ids else None,
                messages=[group[0].get("messages") for group in groups],
                trainer_state={"global_step": max(step - 1, 0), "max_steps": record.max_steps, "epoch": 0.0},
                completion_columns=[record.completion_columns(group) for group in groups],
                turns=[[line.get("turns", []) for line in group] if "turns" in group[0] else None for group in groups],
            )
            before = [
                [line["reward"] if against == SCORE else line["parts"].get(against) for line in group]
                for group in groups
            ]
            after = [score.rewards for score in scores]
            changes = [
                Change(step, line["prompt_id"], line["sample"], old, new, line["text"])
                for group, olds, news in zip(groups, before, after, strict=True)
                for line, old, new in zip(group, olds, news, strict=True)
                if not _same(old, new)
            ]
            ties = sum(map(tied, before)), sum(map(tied, after))
            result.steps.append(
                StepChange(step, sum(map(len, before)), _mean(before), _mean(after), len(changes), *ties, len(groups))
            )
            result.changes += changes
            result.failures += [failure for score in scores for failure in score.errors]
    result.changes.sort(key=lambda change: -change.size)
    result.tell()
    return result


class Run:
    """The record of a run of ours."""

    has_ids = True
    has_score = True

    def __init__(self, run: Path) -> None:
        settings = _settings(run)
        self._run, self.steps, self.max_steps = run, recorded_steps(run), settings["steps"]
        if not self.steps:
            raise ValueError(f"{run} has recorded no rollouts yet")
        sources = settings["data"]
        try:
            rows = [
                row
                for each in sources
                for row in load_examples(each.name, each.split, each, limit=each.limit, seed=settings["seed"])
            ]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; run this where the run was started: the path of its data is relative to there"
            ) from error
        self._data, self._examples = names_of(sources), {example.example_id: example for example in rows}
        specs = [RewardSpec(reward["function"], name=reward.get("name")) for reward in settings["rewards"]]
        self._models = [spec.label for spec in specs if spec.function.startswith(MODEL)]  # their scores are recorded
        self._acted = [REWARD] if settings.get("environment") or settings.get("tools") else []
        self._acted += [AGENT_REWARD] if settings.get("agent") else []
        columns = {tuple(row.columns) for row in rows}  # those of each source
        self._common = [name for name in rows[0].columns if all(name in names for names in columns)]
        self.columns = [*self._common, *self._models, *self._acted]

    def groups(self, step: int) -> list[list[dict[str, Any]]]:
        return split_groups(read_rollouts(self._run, step))

    def answer(self, line: dict[str, Any]) -> str:
        return answer_of(line["text"], line.get("turns", []))

    def row(self, line: dict[str, Any]) -> dict[str, Any]:
        """The columns of a prompt, which are found by its id."""
        example = self._examples.get(line["prompt_id"])
        if example is None or example.question.strip() not in line["prompt"]:
            what = "is not there" if example is None else "asks something else"
            raise ValueError(
                f"the data ({self._data}) have changed since the run: its prompt {line['prompt_id']!r} {what} now, so "
                "that its columns cannot be found"
            )
        return {name: example.columns[name] for name in self._common}

    def completion_columns(self, group: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """The columns of completions that are in the record: scores of reward models, rewards of environments."""
        scores = {name: [line["extras"].get(name) for line in group] for name in self._models}
        numbers = {name: [float("nan") if v is None else v for v in values] for name, values in scores.items()}  # null
        stats = [ToolStats(**line["tools"]) if "tools" in line else None for line in group]
        return numbers | {name: [environment_reward(each) for each in stats] for name in self._acted}


def _settings(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    _, settings = recorded_options(path)
    with expecting(path, "configuration of a run"):
        settings["data"] = [SourceOptions.model_validate(source) for source in sources_of(settings)]
        [str(reward["function"]) for reward in settings["rewards"]]
        int(settings["steps"]), int(settings["seed"])
    return settings


def _against(name: str | None, label: str, parts: list[str], has_score: bool) -> str:
    """The recorded value to compare with. TRL records neither its weighted sum nor the weights."""
    names = [*parts, SCORE] if has_score else parts
    if name is None:
        name = label if label in parts else parts[0] if len(parts) == 1 else SCORE
    if name == SCORE and name not in names:
        raise ValueError(
            f"the weighted sum of {', '.join(parts)} was not recorded; compare with one of them (against={parts[0]!r})"
        )
    if name not in names:
        raise ValueError(f"against={name!r} was not recorded{did_you_mean(name, names)}; there are {', '.join(names)}")
    return name


def _same(old: float | None, new: float | None) -> bool:
    """Whether both are the same mark: others record float32."""
    if old is None or new is None:
        return old is new
    return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _mean(groups: list[list[float | None]]) -> float | None:
    values = [value for group in groups for value in group if value is not None]
    return mean(values) if values else None
