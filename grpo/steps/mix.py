"""What a step drew from each of several sources of data."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from grpo.algorithm.dynamic_sampling import Drawn, is_tied
from grpo.config.run import TrainConfig
from grpo.learner.batch import TrainingBatch
from grpo.run.metrics import mean_of
from grpo.steps.callback import Callback
from grpo.task.task import Task

if TYPE_CHECKING:
    from grpo.steps.loop import Run

METRICS = {
    "source/<name>/groups": "groups sampled from one of several sources of data, resampled ones included, count",
    "source/<name>/reward_mean": "reward/mean of that source",
    "source/<name>/zero_variance": "group/zero_variance of that source, of all groups that were sampled, fraction",
    "source/<name>/length_mean": "completion/length_mean of that source, tokens",
}


def callback(run: Run[TrainConfig], task: Task) -> Callback | None:
    return SourceMetrics(task) if task.parts else None


class SourceMetrics(Callback):
    """Measures each source of a step that was drawn from it."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def on_update_begin(self, step: int, drawn: Drawn, batch: TrainingBatch) -> dict[str, float]:
        metrics: dict[str, float | None] = {}
        pairs = list(zip(drawn.all_groups, drawn.all_scores, strict=True))
        for label, part in self.task.parts.items():
            own = [(group, score) for group, score in pairs if self.task.part_of(group.prompt.prompt_id) is part]
            if not own:
                continue
            metrics |= {
                f"source/{label}/groups": float(len(own)),
                f"source/{label}/reward_mean": mean_of(r for _, score in own for r in score.rewards if r is not None),
                f"source/{label}/zero_variance": fmean(is_tied(score) for _, score in own),
                f"source/{label}/length_mean": fmean(c.num_sampled for group, _ in own for c in group.completions),
            }
        return {name: value for name, value in metrics.items() if value is not None}
