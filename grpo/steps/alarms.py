"""Alarms where a reward seems to be hacked; see review/findings/alarms.py for what they look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.run import TrainConfig
from grpo.learner.batch import TrainingBatch
from grpo.steps.callback import Callback
from grpo.task.task import Task
from review.findings.alarms import Alarms, Watched
from rewards.finding import Finding
from rewards.group_score import GroupScore
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from grpo.steps.loop import Run

METRICS = {
    "alarm/length/<name>": "correlation of the scores of `name` with length inside groups; alarms look at five steps",
    "alarm/repetition/<name>": "the same with the share of 3-grams of tokens that a completion had before",
    "alarm/copied/<name>": "the same with: the answer is a number of the question, and incorrect",
    "alarm/correct/<name>": "the same with being correct; only if the reference answers are numbers",
    "alarm/formed/<name>": "the same with: the answer has the form `#### 42` or a box",
    "alarm/format/<name>": "incorrect completions among those with the best score of `name`; only if nine of ten "
    "well-formed ones have it; fraction",
    "alarm/identical": "completions whose text another prompt got too, fraction",
}


def callback(run: Run[TrainConfig], task: Task) -> Callback | None:
    return AlarmCallback(task.watched_rewards(), run.log.event) if run.ranks.first else None


class AlarmCallback(Callback):
    """Records an event for each alarm. `rewards` are the marks that are watched."""

    def __init__(self, rewards: Sequence[str], event: Callable[..., None]) -> None:
        self.alarms, self.event = Alarms(rewards), event

    def on_update_begin(self, step: int, drawn: Drawn, batch: TrainingBatch) -> dict[str, float]:
        self._sound(step, self.alarms.observe(list(map(_watched, drawn.all_groups, drawn.all_scores))))
        return self.alarms.values

    def on_evaluate(self, step: int, results: Mapping[str, Any]) -> None:
        """An alarm where the reward rises and held-out accuracy falls; by gold answers where the data have them."""
        result = results.get("sampled")
        if result is None:
            return
        completions = [one for group in result.groups for one in _watched(group, None)]
        correct = [one.correct for one in completions if one.correct is not None]
        accuracy = fmean(correct) if correct else result.accuracy
        if accuracy is not None:
            self._sound(step, self.alarms.evaluated(accuracy, len(correct) or result.completions))

    def _sound(self, step: int, alarms: Sequence[Finding]) -> None:
        for alarm in alarms:
            self.event("alarm", step=step, said=alarm.evidence, unshown=alarm.as_json())


def _watched(group: RolloutGroup, score: GroupScore | None) -> list[Watched]:
    """The completions as the alarms see them: the answer that a reward reads, and the tokens that the policy sampled.
    `score` is None where marks do not matter."""
    prompt = group.prompt
    question, answer = str(prompt.columns.get("question", prompt.text)), prompt.columns.get("answer")
    marks = {"score": score.rewards} | score.parts if score else {}
    watched = []
    for i, completion in enumerate(group.completions):
        ids = completion.token_ids
        if completion.sampled:  # what a tool wrote is not the policy's
            ids = list(compress(ids, completion.sampled))
        of_completion = {name: values[i] for name, values in marks.items()}
        turns = completion.num_turns
        watched.append(Watched.of(prompt.prompt_id, question, answer, completion.answer, ids, of_completion, turns))
    return watched
