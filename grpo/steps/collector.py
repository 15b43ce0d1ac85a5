"""What a step learns from: prompts, groups of completions, their scores; tied groups are refilled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

from rich.progress import Progress

from grpo.algorithm.dynamic_sampling import Drawn, draw_groups
from grpo.data.prompts import PromptStream
from grpo.run.metrics import rollout_metrics, tail_share
from grpo.run.stop import signals
from grpo.steps.callback import Callback
from grpo.steps.loop import Run
from grpo.task.task import Task
from policies.policy import Policy
from rewards.group_score import GroupScore, RewardFailed
from rollout.draft_stats import head_accepted
from rollout.faults import OnFinished
from rollout.group import Prompt, RolloutGroup
from rollout.pool import Sampler
from rollout.sampling import SamplingParams

# The states of the data and of the callbacks, and what became of the last drafts.
Snapshot: TypeAlias = tuple[dict[str, Any], list[dict[str, Any]], tuple[float, ...]]


class Collector:
    """Draws the groups of each step from `pool`, which is set before the first. `sampling` is how completions are
    sampled. Its state is the order of the data, what callbacks keep, and `head_accepted`: what became of the draft
    head's drafts in the last step."""

    pool: Sampler

    def __init__(
        self,
        run: Run[Any],
        task: Task,
        policy: Policy,
        sampling: SamplingParams,
        stream: PromptStream,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.run, self.task, self.callbacks, self.stream, self.sampling = run, task, list(callbacks), stream, sampling
        self.config, self.tokenizer = run.config, policy.tokenizer
        self.backend = run.config.whole_rollout.backend or policy.backend
        self.head_accepted: tuple[float, ...] = ()

    # ---- one draw ---------------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """The prompts of `step` come next."""
        self.task.reached(step - 1)
        for callback in self.callbacks:
            callback.on_step_begin(step)

    def prompts(self, count: int, step: int, draw: int = 0) -> list[Prompt]:
        """Different prompts: those that a callback chooses, or the next ones of the data."""
        chosen = (callback.choose_prompts(count, step, draw) for callback in self.callbacks)
        examples = next((some for some in chosen if some is not None), None) or self.stream.take_examples(count)
        return [self.task.prompt(example, self.tokenizer) for example in examples]

    def params(self, step: int) -> SamplingParams:
        """How the completions of a step are sampled."""
        return replace(self.sampling, head_accepted=self.head_accepted)

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: OnFinished) -> list[RolloutGroup]:
        """A group of each prompt, by `params.at(step, draw)`."""
        with self.run.phase("sampling"):
            return self.pool.sample(prompts, params, on_finished)

    def score(self, groups: Sequence[RolloutGroup], step: int) -> list[GroupScore]:
        """The score of each group. A reward that fails is an event."""
        try:
            scores = self.task.score(groups)
        except RewardFailed as error:
            self.run.log.event("reward_error", step=step, **vars(error.failure))
            raise
        for callback in self.callbacks:
            callback.on_groups_sampled(step, groups, scores)
        return scores

    # ---- one step ---------------------------------------------------------------------------------------------------

    def collect(self, step: int, quiet: bool = False) -> Drawn:
        """The scored groups of a step, with an event for every reward that failed. `quiet` draws no bars."""
        self.begin_step(step)
        options, params = self.config.rollout, self.params(step)
        measured: dict[str, float] = defaultdict(float)

        def sample(prompts: Sequence[Prompt], draw: int) -> tuple[list[RolloutGroup], list[GroupScore]]:
            what = f"step {step}: {'sampling' if draw == 0 else f'resample {draw}'}"
            bar = progress.add_task(what, total=len(prompts) * params.group_size)
            with self.run.timed("time/rollout", measured):
                groups = self.sample(prompts, params.at(step, draw), partial(progress.advance, bar))
                if not draw and self.backend != "vllm" and not self.config.agent:  # which know no shards
                    measured.update(tail_share(groups, options.prompts_per_shard))
            with self.run.timed("time/reward", measured):
                scores = self.score(groups, step)
            progress.remove_task(bar)
            return groups, scores

        def replacements(tied: list[Prompt], draw: int) -> Sequence[Prompt]:
            return self.prompts(len(tied), step, draw)

        with Progress(disable=True) if quiet else self.run.log.progress() as progress:
            prompts = self.prompts(self.config.prompts_per_step, step)
            drawn = draw_groups(prompts, options.max_resamples, sample, replacements)
        self.learn_drafts(drawn.all_groups)
        for failure in chain.from_iterable(score.errors for score in drawn.all_scores):
            self.run.log.event("reward_error", step=step, **vars(failure))
        drawn.metrics |= measured | rollout_metrics(drawn.all_groups, drawn.all_scores)
        for callback in self.callbacks:
            drawn.metrics |= callback.step_metrics(step)
        drawn.metrics |= drawn.counts() if options.max_resamples else {}
        signals.check()
        return drawn

    def learn_drafts(self, groups: Sequence[RolloutGroup]) -> None:
        """The next step chooses how much it drafts by what became of the drafts of these."""
        self.head_accepted = head_accepted(chain.from_iterable(group.completions for group in groups))

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt of one of the training problems, again."""
        [example] = [example for example in self.task.train if example.example_id == prompt_id]
        return self.task.prompt(example, self.tokenizer)

    # ---- its state --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Gives what `put_back` needs to undo what is collected from now on."""
        return self.stream.state_dict(), [callback.state_dict() for callback in self.callbacks], self.head_accepted

    def put_back(self, before: Snapshot) -> None:
        stream, states, self.head_accepted = before
        self.stream.load_state_dict(stream)
        for callback, state in zip(self.callbacks, states, strict=True):
            callback.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON takes it."""
        state: dict[str, Any] = {"stream": self.stream.state_dict()}
        for callback in self.callbacks:
            state |= callback.state_dict()
        return state | ({"head_accepted": list(self.head_accepted)} if self.head_accepted else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        for callback in self.callbacks:
            callback.load_state_dict(state)
        self.head_accepted = tuple(state.get("head_accepted", ()))
