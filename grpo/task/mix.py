"""The task of a run with several sources of data: each has a task, with prompts, rewards and held-out problems of its
own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.environment import rewards_of
from grpo.config.mtp import MtpConfig
from grpo.config.run import LearningConfig, TrainConfig
from grpo.data.mix import MixedStream
from grpo.data.trained_on import record_trained_on
from grpo.learner.row import PackedRow
from grpo.run.log import RunLog
from grpo.task.task import TAKE_OUT, Task, reward_specs
from policies.policy import Policy
from rewards.config.data import SourceOptions
from rewards.data.examples import Example, default_held_out_split
from rewards.data.leakage import refuse_overlap
from rewards.data.source import BUILT_IN, FILE_KINDS
from rewards.group_score import GroupScore
from rewards.verdicts import Verdicts
from rollout.group import Prompt, RolloutGroup


class Mix(Task):
    """Asks the task of a source about each of its prompts. A reward that does not score a source abstains there. What
    belongs to no source, such as the environment, is that of the first."""

    def __init__(self, config: LearningConfig | MtpConfig, *, scores: bool, model_known: bool) -> None:
        """Raises ValueError for what a source alone is refused for, and for what the sources have in common."""
        sources = {str(source.label): source for source in config.data}
        self.weights = {label: source.weight for label, source in sources.items()}
        self.parts = tasks = dict[str, Task]()
        try:
            for label, source in sources.items():
                own = options_of_source(config, source)
                tasks[label] = Task.of(own, scores=scores, model_known=model_known)
            self._gather()
            self.prompts_per_step = config.prompts_per_step
            scores_any = any(part.reward_weights for part in self.parts.values())
            specs = reward_specs(rewards_of(config)) if scores_any else []
            self.reward_weights = {spec.label: spec.weight for spec in specs}
            if config.eval.limit and not self.held_out:
                raise ValueError(
                    f"eval.limit={config.eval.limit}, but no source of data has held-out problems; hold out a share of "
                    "one (held_out: 0.1), or set eval.limit to 0"
                )
            learns = self.unsolved if isinstance(config, TrainConfig) else self.solved
            self._refuse_too_few("prompts_per_step", config.prompts_per_step, learns)
            if isinstance(config, TrainConfig) and config.sft.steps:
                self._refuse_too_few("sft.batch_size", config.sft.batch_size, self.solved)
            self._refuse_overlap_of_sources()
            self.validation = self.unknown(self.validation, [*self.train, *self.held_out])  # of all sources
        except BaseException:
            self.close()
            raise

    def _gather(self) -> None:
        parts = list(self.parts.values())
        of_first = {name: value for name, value in vars(parts[0]).items() if name not in ("scorer", "verdicts")}
        self.__dict__ |= of_first
        for name in ("train", "solved", "unsolved", "validation", "held_out"):
            setattr(self, name, [example for part in parts for example in getattr(part, name)])
        self.trained_on = frozenset(chain.from_iterable(part.trained_on for part in parts))
        for part in parts:
            part.trainer_state = self.trainer_state
        self._part_of = dict[str, Task]()
        for label, part in self.parts.items():
            for example in (*part.train, *part.validation, *part.held_out):
                if self._part_of.setdefault(example.example_id, part) is not part:
                    raise ValueError(
                        f"data: {label} has {example.example_id}, and so has a source before it; take it out "
                        "of one of the two, or rename one of the files"
                    )

    def _refuse_too_few(self, key: str, count: int, examples: Sequence[Example]) -> None:
        of_source = Counter(id(self.part_of(example.example_id)) for example in examples)
        for label, most in self.stream(0, examples).most(count).items():
            there = of_source[id(self.parts[label])]
            if most > there:
                raise ValueError(
                    f"{key}={count} takes up to {most} different prompts from the source {label}, which has "
                    f"{there} training examples; lower it or the weight of the source, or use more data"
                )

    def _refuse_overlap_of_sources(self) -> None:
        """Raises ValueError for a held-out problem of one source that another source trains on, or shows."""
        for label, part in self.parts.items():
            evaluated = part.fingerprints(part.held_out)
            for name, other in self.parts.items():
                known = dict.fromkeys(other.trained_on, "") | other.fingerprints(other.train)
                what = f"are held out of the source {label}, and the source {name} trains on them"
                refuse_overlap(evaluated, {} if other is part else known, what, f"{TAKE_OUT}.")

    def part_of(self, prompt_id: str) -> Task:
        return self._part_of.get(prompt_id) or next(iter(self.parts.values()))

    def stream(self, seed: int, examples: Sequence[Example] | None = None) -> MixedStream:
        sources: dict[str, list[Example]] = {label: [] for label in self.parts}
        labels = {part: label for label, part in self.parts.items()}
        for example in self.unsolved if examples is None else examples:
            sources[labels[self.part_of(example.example_id)]].append(example)
        return MixedStream(sources, self.weights, seed)

    def record_split(self, run_log: RunLog) -> None:
        if not self.leads:
            return
        record_trained_on(run_log.output_dir, self.trained_on)
        counts = [f"{len(part.held_out):,} of {label}" for label, part in self.parts.items() if part.held_out]
        if counts:
            run_log.say(f"held-out problems: {', '.join(counts)}: no source trains on one, or shows it")

    def fingerprints(self, examples: Iterable[Example]) -> dict[str, str]:
        each = (self.part_of(example.example_id).fingerprints([example]) for example in examples)
        return {fingerprint: name for one in each for fingerprint, name in one.items()}

    def check_lengths(
        self, policy: Policy, max_completion_tokens: int | None, *, learns_solutions: bool = False
    ) -> None:
        for part in self.parts.values():
            part.check_lengths(policy, max_completion_tokens, learns_solutions=learns_solutions)

    def corpus(self, limit: int = 4000) -> Iterator[str]:
        return chain.from_iterable(part.corpus(limit // len(self.parts)) for part in self.parts.values())

    def prompt(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        return self.part_of(example.example_id).prompt(example, tokenizer)

    def solution(self, example: Example, tokenizer: PreTrainedTokenizerBase, stop: int) -> PackedRow:
        return self.part_of(example.example_id).solution(example, tokenizer, stop)

    # ---- rewards ----------------------------------------------------------------------------------------------------

    def describe_rewards(self) -> list[dict[str, object]]:
        rewards = {reward["name"]: reward for part in self.parts.values() for reward in part.describe_rewards()}
        return list(rewards.values())

    @property
    def verdicts(self) -> Verdicts:  # type: ignore[override]
        """Those of a source whose marks are no verdicts, where there is one; else those of the first."""
        verdicts = [part.verdicts for part in self.parts.values()]
        return next((each for each in verdicts if not each.are_given), verdicts[0])

    def watched_rewards(self) -> list[str]:
        names = dict.fromkeys(name for part in self.parts.values() for name in part.watched_rewards())
        return sorted(names, key="score".__eq__)  # the score is last

    def score(self, groups: Sequence[RolloutGroup]) -> list[GroupScore]:
        scores: dict[int, GroupScore] = {}
        for part in self.parts.values():
            places = [i for i, group in enumerate(groups) if self.part_of(group.prompt.prompt_id) is part]
            if places:
                scores |= zip(places, part.score([groups[i] for i in places]), strict=True)
        for score in scores.values():
            abstained: list[float | None] = [None] * len(score.rewards)
            score.parts = {name: score.parts.get(name, list(abstained)) for name in self.reward_weights}
        return [scores[i] for i in range(len(groups))]

    def lost(self) -> dict[str, float]:
        lost: Counter[str] = Counter()
        for part in self.parts.values():
            lost.update(part.lost())
        return dict(lost)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()


def options_of_source(config: LearningConfig | MtpConfig, source: SourceOptions) -> LearningConfig | MtpConfig:
    """The configuration of a run that has this source only. How many prompts a step takes of it is the mix's to say."""
    changes: dict[str, Any] = {"data": [source], "prompts_per_step": 1}
    if not _has_held_out(source, config.eval.split):
        changes["eval"] = config.eval.model_copy(update={"limit": 0})
    if isinstance(config, TrainConfig):
        changes["sft"] = config.sft.model_copy(update={"batch_size": 1})
    return config.model_copy(update=changes)


def _has_held_out(source: SourceOptions, split: str | None) -> bool:
    """Tells whether the source has held-out problems: one file has them by `held_out` alone, a folder by a file."""
    path = Path(source.name).expanduser()
    if source.held_out or source.name in BUILT_IN or not path.exists():
        return True
    return any((path / f"{split or default_held_out_split(source.name)}{kind}").is_file() for kind in FILE_KINDS)
