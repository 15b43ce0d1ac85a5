"""Steps that taught nothing: after several in a row the user reads why, and what to change."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.run import TrainConfig
from grpo.learner.batch import TrainingBatch
from grpo.steps.callback import Callback
from grpo.task.task import Task
from policies import presets
from rewards.config.data import names_of

if TYPE_CHECKING:
    from grpo.steps.loop import Run

STEPS = 5  # in a row, before it is said
OPENING = 2  # so many are enough at the start of a run: it has not learned anything yet


def callback(run: Run[TrainConfig], task: Task) -> Callback:
    return ZeroVarianceSteps(run, task)


class ZeroVarianceSteps(Callback):
    """Counts the steps in a row whose advantages were all zero. Full marks of the task's first reward are a right
    answer."""

    def __init__(self, run: Run[TrainConfig], task: Task) -> None:
        self.run, self.first_reward, self.max_score = run, task.first_reward, task.max_score
        self.by_teacher = run.config.loss.advantage == "distill"  # with any advantages
        self.in_a_row: list[Drawn] = []
        self.step = 0  # of the last batch
        self.told = False
        self.opening = True  # no step has taught anything yet

    def on_update_begin(self, step: int, drawn: Drawn, batch: TrainingBatch) -> dict[str, float]:
        if step > OPENING and not self.in_a_row:
            self.opening = False  # a resumed run began long ago
        tied = batch.all_tied and not self.by_teacher
        again, self.step = step == self.step, step
        if tied and again:  # the batch before it has counted this step
            return {}
        diagnosis = self.observe(drawn, tied)
        if diagnosis:
            self.run.log.nothing_learned(step, *diagnosis)
        return {}

    def on_custom_loss(self) -> None:
        self.in_a_row = []
        if self.opening:
            self.opening = self.told = False  # a later standstill has another reason

    def observe(self, drawn: Drawn, tied: bool) -> tuple[str, list[str]] | None:
        """Why nothing is learned, and what to change, after a step whose batch was `tied` or not. None if the step
        taught something, if it is too early, and if it was said before."""
        if not tied:
            self.on_custom_loss()
            return None
        self.in_a_row = [*self.in_a_row, drawn][-STEPS:]
        if self.told or len(self.in_a_row) < self._needed():
            return None
        self.told = True
        return self._diagnosis()

    def _needed(self) -> int:
        """So many steps in a row are enough to say it."""
        return OPENING if self.opening and self._without_variance() else STEPS

    def _without_variance(self) -> bool:
        """Whether no group of these steps has two different rewards."""
        return all(len(drawn.tied) == len(drawn.groups) for drawn in self.in_a_row)

    def _diagnosis(self) -> tuple[str, list[str]]:
        scores = [score for drawn in self.in_a_row for score in drawn.scores]
        rewards = [reward for score in scores for reward in score.rewards if reward is not None]
        marks = [mark for score in scores for mark in score.parts.get(self.first_reward, []) if mark is not None]
        right = [mark >= self.max_score for mark in marks]
        if not self._without_variance():
            return (
                "the rewards differ, but every completion that could teach something was left out of the loss",
                ["raise rollout.max_completion_tokens, or set loss.mask_truncated_completions: false"],
            )
        if not rewards:
            return (
                "no completion has a score: the rewards abstained or failed",
                ["try the reward on gold, wrong and empty completions: quartet reward test"],
            )
        if right and all(right):
            return "every completion got full marks: the problems are too easy for this policy", self._when_easy()
        if len(set(rewards)) == 1:
            return self._when_all_same(rewards[0])
        return (
            "the groups' rewards differ from each other, but inside each group all completions got the same: some "
            f"problems are too easy and others too hard{self._cut()}",
            ["leave out problems that are always or never solved", *self._spread()],
        )

    def _when_easy(self) -> list[str]:
        now = names_of(self.run.config.data)
        return [
            f"use harder problems: data.name or data.task_options (now {now}); of these there is little left to learn",
            *self._spread(),
        ]

    def _when_all_same(self, reward: float) -> tuple[str, list[str]]:
        """The most certain reason first: random weights, then a form that the reward does not read."""
        same = f"every completion got the same reward, {reward:g}"
        config = self.run.config
        if self.opening and config.model in presets.PRESETS and not config.sft.steps:
            return (
                f"{same}: the weights of the preset {config.model!r} are random, and sft.steps is 0, so the "
                f"policy cannot answer anything{self._cut()}",
                [
                    "train it on reference solutions first: sft.steps: 300 (now 0)",
                    f"or start from a trained policy: model (now {config.model}): a checkpoint folder or a hub id",
                ],
            )
        completions = [c for drawn in self.in_a_row for group in drawn.groups for c in group.completions]
        answered = sum(map(self._answers, self.in_a_row))
        if answered:
            return (
                f"{same}, but {answered} of {len(completions)} completions end with the reference answer: the reward "
                f"may not read their form{self._cut()}",
                [
                    "see which forms the reward reads: quartet reward test",
                    "ask for that form in the prompt: data.template or data.few_shot",
                    *self._when_hard(),
                ],
            )
        return f"{same}: the policy never does better{self._cut()}", self._when_hard()

    @staticmethod
    def _answers(drawn: Drawn) -> int:
        """How many completions end with the reference answer of their prompt, whatever their reward is."""
        answered = 0
        for group in drawn.groups:
            solution = str(group.prompt.columns.get("answer") or "")
            answer = solution.rpartition("####")[2].strip()
            ends = re.compile(rf"(?<![\w.]){re.escape(answer)}\W*$")
            answered += sum(bool(answer and ends.search(c.text)) for c in group.completions)
        return answered

    def _when_hard(self) -> list[str]:
        limit = self.run.config.rollout.max_completion_tokens
        return [
            *([f"let completions end: raise rollout.max_completion_tokens (now {limit})"] if self._cut() else []),
            f"train longer on reference solutions first: sft.steps (now {self.run.config.sft.steps})",
            "begin with easier problems: curriculum.shortest_share below 1",
            *self._spread(),
            "give parts of the marks for parts of the answer, by a second reward (rewards)",
            "see that the reward gives a gold solution full marks: quartet reward test",
        ]

    def _spread(self) -> list[str]:
        """Tells what makes the completions of a group differ, and what replaces groups in which they do not."""
        rollout = self.run.config.rollout
        return [
            f"raise rollout.temperature (now {rollout.temperature:g})",
            f"use a larger rollout.group_size (now {rollout.group_size})",
            f"resample zero-variance groups: rollout.max_resamples (now {rollout.max_resamples})",
        ]

    def _cut(self) -> str:
        groups = [group for drawn in self.in_a_row for group in drawn.groups]
        reasons = [completion.finish_reason for group in groups for completion in group.completions]
        cut = reasons.count("length") / max(len(reasons), 1)
        limit = self.run.config.rollout.max_completion_tokens
        return f" ({cut:.0%} of them were cut at rollout.max_completion_tokens={limit})" if cut > 0.5 else ""
