"""What a step learns from: prompts by the curriculum, groups of completions, their scores; tied groups refilled."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from grpo.algorithm.dynamic_sampling import Drawn, draw_groups
from grpo.config.run import TrainConfig
from grpo.data.curriculum import Curriculum, completion_tokens, draft_depth
from grpo.task import Task
from rewards.group_score import GroupScore
from rollout.group import Prompt, RolloutGroup
from rollout.pool import Pool
from rollout.sampling import SamplingParams


class Collector:
    """Draws the groups of each step. The curriculum is its only state; `sampling` is that of a run without one."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        curriculum: Curriculum,
        pool: Pool,
        sampling: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config, self.task, self.curriculum, self.pool = config, task, curriculum, pool
        self.sampling, self.tokenizer = sampling, tokenizer

    def collect(self, step: int, progress: Progress, times: defaultdict[str, float]) -> Drawn:
        """The scored groups of a step; adds to `time/rollout` and `time/reward`."""
        options, params = self.config.rollout, self._params(step)

        def take(count: int, draw: int = 0) -> list[Prompt]:
            examples = self.curriculum.take(count, step, draw)
            return [self.task.prompt(example, self.tokenizer) for example in examples]

        def sample(prompts: Sequence[Prompt], draw: int) -> tuple[list[RolloutGroup], list[GroupScore]]:
            what = f"step {step}: {'sampling' if draw == 0 else f'refill {draw}'}"
            bar = progress.add_task(what, total=len(prompts) * params.group_size)
            started = time.perf_counter()
            groups = self.pool.sample(prompts, params.at(step, draw), lambda ended: progress.advance(bar, ended))
            sampled = time.perf_counter()
            scores = self.task.score(groups)
            times["time/rollout"] += sampled - started
            times["time/reward"] += time.perf_counter() - sampled
            progress.remove_task(bar)
            rates = [(group.prompt.prompt_id, self._pass_rate(s)) for group, s in zip(groups, scores, strict=True)]
            self.curriculum.record((prompt_id, rate) for prompt_id, rate in rates if rate is not None)
            return groups, scores

        def replacements(tied: list[Prompt], draw: int) -> Sequence[Prompt]:
            return tied if options.refill_prompts == "same" else take(len(tied), draw)

        return draw_groups(take(self.config.prompts_per_step), options.refill_draws, sample, replacements)

    def draft_depth(self, step: int) -> int:
        """How deep the head learns."""
        return draft_depth(self.config.curriculum, self.config.mtp.depth, step)

    def metrics(self, step: int, drawn: Drawn) -> dict[str, float]:
        """curriculum/* of the options that are on, and group/* of dynamic sampling."""
        metrics, options = self.curriculum.metrics(step), self.config.curriculum
        if options.completion_tokens is not None:
            metrics["curriculum/completion_tokens"] = float(self._params(step).max_completion_tokens)
        if options.draft_depth is not None:
            metrics["curriculum/draft_depth"] = float(self.draft_depth(step))
        return metrics | (drawn.metrics() if self.config.rollout.refill_draws else {})

    def _params(self, step: int) -> SamplingParams:
        """A head that has not learned deep drafts yet does not make them."""
        depth, drafts = self.draft_depth(step), self.sampling.draft_tokens
        limit = completion_tokens(self.config.curriculum, self.sampling.max_completion_tokens, step)
        if depth < self.config.mtp.depth:
            drafts = depth if drafts is None else min(drafts, depth)
        return replace(self.sampling, max_completion_tokens=limit, draft_tokens=drafts)

    def _pass_rate(self, score: GroupScore) -> float | None:
        """Share with full marks of a group's completions that have a mark; None where none of them has one.

        A failure of the function that marks is no mark, whatever `reward.on_error` puts in its place.
        """
        first = self.task.first_reward
        failed = {failure.sample_index for failure in score.errors if failure.function == first}
        marks = [mark for i, mark in enumerate(score.parts[first]) if i not in failed]
        passed = [self.task.verdicts.has_full_marks(mark) for mark in marks]
        marked = [right for right in passed if right is not None]
        return fmean(marked) if marked else None
