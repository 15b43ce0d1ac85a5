"""Steps that taught nothing: after several in a row the user reads why, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.run import TrainConfig
from grpo.learner.batch import TrainingBatch
from grpo.steps.listener import Listener
from grpo.task.task import Task

if TYPE_CHECKING:
    from grpo.steps.loop import Run

STEPS = 5  # in a row, before it is said


def listener(run: Run[TrainConfig], task: Task) -> Listener:
    return TiedSteps(run, task)


class TiedSteps(Listener):
    """Counts the steps in a row whose advantages were all zero. Full marks of the task's first reward are a right
    answer."""

    def __init__(self, run: Run[TrainConfig], task: Task) -> None:
        self.run, self.first_reward, self.full_marks = run, task.first_reward, task.full_marks
        self.by_teacher = run.config.loss.advantage == "distill"  # with any advantages
        self.in_a_row: list[Drawn] = []
        self.told = False

    def learns(self, step: int, drawn: Drawn, batch: TrainingBatch) -> dict[str, float]:
        diagnosis = self.observe(drawn, batch.all_tied and not self.by_teacher)
        if diagnosis:
            self.run.log.nothing_learned(step, *diagnosis)
        return {}

    def taught(self) -> None:
        self.in_a_row = []

    def observe(self, drawn: Drawn, tied: bool) -> tuple[str, list[str]] | None:
        """Says why nothing is learned, and what to change, after a step whose batch was `tied` or not. None where the
        step taught something, where it is too early, and where it was said before."""
        self.in_a_row = [*self.in_a_row, drawn][-STEPS:] if tied else []
        if self.told or len(self.in_a_row) < STEPS:
            return None
        self.told = True
        return self._diagnosis()

    def _diagnosis(self) -> tuple[str, list[str]]:
        scores = [score for drawn in self.in_a_row for score in drawn.scores]
        rewards = [reward for score in scores for reward in score.rewards if reward is not None]
        marks = [mark for score in scores for mark in score.parts.get(self.first_reward, []) if mark is not None]
        right = [mark >= self.full_marks for mark in marks]
        if not all(drawn.tied == list(range(len(drawn.groups))) for drawn in self.in_a_row):
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
            why = f"every completion got the same reward, {rewards[0]:g}: the policy never does better{self._cut()}"
            return why, self._when_hard()
        return (
            "the groups' rewards differ from each other, but inside each group all completions got the same: some "
            f"problems are too easy and others too hard{self._cut()}",
            ["choose problems between the two: curriculum.by_difficulty: true", *self._spread()],
        )

    def _when_easy(self) -> list[str]:
        data = self.run.config.data
        harder = f"data.levels (now {data.levels})" if data.name == "word_problems" else f"data.name (now {data.name})"
        return [f"use harder problems: {harder}; of these there is little left to learn", *self._spread()]

    def _when_hard(self) -> list[str]:
        return [
            f"start warmer on gold solutions: warm_start.steps (now {self.run.config.warm_start.steps})",
            "begin with easier problems: curriculum.shortest_share below 1, curriculum.by_difficulty: true",
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
            f"sample tied groups again: rollout.refill_draws (now {rollout.refill_draws})",
        ]

    def _cut(self) -> str:
        groups = [group for drawn in self.in_a_row for group in drawn.groups]
        reasons = [completion.finish_reason for group in groups for completion in group.completions]
        cut = reasons.count("length") / max(len(reasons), 1)
        limit = self.run.config.rollout.max_completion_tokens
        return f" ({cut:.0%} of them were cut at rollout.max_completion_tokens={limit})" if cut > 0.5 else ""
