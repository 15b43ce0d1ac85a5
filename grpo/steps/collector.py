"""What a step learns from: prompts by the curriculum, groups of completions, their scores; tied groups refilled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from grpo.algorithm.dynamic_sampling import Drawn, draw_groups
from grpo.config.run import TrainConfig
from grpo.data.curriculum import Curriculum, completion_tokens, draft_depth
from grpo.learner.batch import TrainingBatch
from grpo.learner.build import sampling_backend
from grpo.run.memory_errors import phase
from grpo.run.metrics import rollout_metrics, tail_share
from grpo.run.stop import signals
from grpo.steps.loop import Run
from grpo.steps.tied_steps import TiedSteps
from grpo.task.sampling import environment_of, sampling_params
from grpo.task.task import Task
from policies.policy import Policy
from rewards.group_score import GroupScore, RewardFailed
from rollout.depth import FEW_ROWS, PROMPT_TOKENS
from rollout.group import Prompt, RolloutGroup, head_accepted
from rollout.pool import Sampler
from rollout.sampling import SamplingParams

if TYPE_CHECKING:
    from grpo.algorithm.alarms import Alarm, Alarms, Watched

PROMPTS_READ = 256  # whose lengths say how long sequences become


class Collector:
    """Draws the groups of each step, and keeps the record of them. Its state is the curriculum; `later`, the pass rates
    of steps that were sampled ahead, which the curriculum learns only when it is their turn (contract 12); and
    `head_accepted`, what became of the head's drafts in the last step."""

    def __init__(
        self, run: Run[TrainConfig], task: Task, curriculum: Curriculum, pool: Sampler, policy: Policy
    ) -> None:
        self.run, self.task, self.curriculum, self.pool = run, task, curriculum, pool
        self.tokenizer, self.backend = policy.tokenizer, sampling_backend(run.config, policy)
        config = run.config
        self.rollout, self.prompts_per_step, self.deepest = config.rollout, config.prompts_per_step, config.mtp.depth
        options, shard = config.rollout, config.rollout.prompts_per_shard
        rounds = 0
        if shard * options.group_size <= FEW_ROWS:
            rounds = config.steps * -(-config.prompts_per_step // shard) * options.max_completion_tokens
        sampling = sampling_params(policy, options, options.group_size, config.seed, dtype=config.dtype, rounds=rounds)
        self.sampling = replace(
            sampling, record_routing=config.learner.routing_replay, environment=environment_of(config)
        )
        self.longest_prompt = PROMPT_TOKENS
        if self.sampling.compiled:  # graphs have as much room as the first prompts tell
            prompts = [task.prompt(example, policy.tokenizer) for example in task.train[:PROMPTS_READ]]
            self.longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
            run.log.event("graphs", compile=options.compile, planned_rounds=rounds)
        self.later: list[tuple[int, str, float]] = []  # step, prompt and its rate
        self.alarms: Alarms | None = None
        if run.config.log.alarms and run.ranks.first:
            from grpo.algorithm.alarms import Alarms

            self.alarms = Alarms(task.watched_rewards())
        self.head_accepted: tuple[float, ...] = ()
        self.tied_steps = TiedSteps(
            config.data, config.rollout, config.warm_start.steps, task.first_reward, task.full_marks
        )

    def collect(self, step: int, quiet: bool = False) -> Drawn:
        """The scored groups of a step, with an event for every reward that failed. `quiet` draws no bars."""
        options, params, measured = self.rollout, self._params(step), {"time/rollout": 0.0, "time/reward": 0.0}
        self.task.reached(step - 1)
        self._learn_rates(up_to=step - 1 - options.ahead)

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            measured[name] += time.perf_counter() - started

        def take(count: int, draw: int = 0) -> list[Prompt]:
            examples = self.curriculum.take(count, step, draw)
            return [self.task.prompt(example, self.tokenizer) for example in examples]

        def sample(prompts: Sequence[Prompt], draw: int) -> tuple[list[RolloutGroup], list[GroupScore]]:
            what = f"step {step}: {'sampling' if draw == 0 else f'refill {draw}'}"
            bar = progress.add_task(what, total=len(prompts) * params.group_size)
            with timed("time/rollout"), phase("sampling", self.run.config):
                groups = self.pool.sample(prompts, params.at(step, draw), partial(progress.advance, bar))
                if not draw and self.backend != "vllm" and not self.run.config.agent:  # which know no shards
                    measured.update(tail_share(groups, options.prompts_per_shard))
            with timed("time/reward"):
                scores = self._score(groups, step)
            progress.remove_task(bar)
            rates = [(group.prompt.prompt_id, self._pass_rate(s)) for group, s in zip(groups, scores, strict=True)]
            self.later = self.later + [(step, prompt_id, rate) for prompt_id, rate in rates if rate is not None]
            if not options.ahead:
                self._learn_rates(up_to=step)
            return groups, scores

        def replacements(tied: list[Prompt], draw: int) -> Sequence[Prompt]:
            return tied if options.refill_prompts == "same" else take(len(tied), draw)

        with Progress(disable=True) if quiet else self.run.log.progress() as progress:
            drawn = draw_groups(take(self.prompts_per_step), options.refill_draws, sample, replacements)
        self.head_accepted = head_accepted(c for group in drawn.all_groups for c in group.completions)
        for failure in (failure for score in drawn.all_scores for failure in score.errors):
            self.run.log.event("reward_error", step=step, **vars(failure))
        drawn.metrics |= measured | rollout_metrics(drawn.all_groups, drawn.all_scores) | self._metrics(step, drawn)
        signals.check()
        return drawn

    def snapshot(self) -> Any:
        """For `put_back`, which undoes what was collected since."""
        return self.curriculum.state_dict(), self.later, self.head_accepted

    def put_back(self, before: Any) -> None:
        curriculum, self.later, self.head_accepted = before
        self.curriculum.load_state_dict(curriculum)

    def state_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        state = self.curriculum.state_dict()
        if self.rollout.ahead:
            state["later"] = [list(entry) for entry in self.later]
        if self.head_accepted:
            state["head_accepted"] = list(self.head_accepted)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All but the curriculum's, which is there already."""
        self.later = [(step, prompt_id, rate) for step, prompt_id, rate in state.get("later", [])]
        self.head_accepted = tuple(state.get("head_accepted", ()))

    def _learn_rates(self, up_to: int) -> None:
        self.curriculum.record((prompt_id, rate) for step, prompt_id, rate in self.later if step <= up_to)
        self.later = [entry for entry in self.later if entry[0] > up_to]

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt of one of the training problems, again."""
        [example] = [example for example in self.task.train if example.example_id == prompt_id]
        return self.task.prompt(example, self.tokenizer)

    def keep(
        self, step: int, drawn: Drawn, batch: TrainingBatch, policy_logprobs: Mapping[int, list[float]] | None = None
    ) -> None:
        """The step's completions into the folder of the run, and a word where nothing is learned for long.

        Once it was learned from them, they are written again with the learner's log-probabilities.
        """
        self.run.log.rollouts(
            step,
            drawn.groups,
            drawn.scores,
            batch.advantages,
            draws=drawn.draws,
            backend=self.backend,
            policy_logprobs=policy_logprobs,
        )
        if policy_logprobs is not None:
            return
        if told := self.tied_steps.observe(drawn, batch.advantages):
            self.run.log.nothing_learned(step, *told)
        if self.alarms:
            self._sound(step, self.alarms.observe(list(map(_watched, drawn.all_groups, drawn.all_scores))))
            self.run.metrics |= self.alarms.values

    def evaluated(self, step: int, results: Mapping[str, Any]) -> None:
        """An alarm where the reward rises and held-out accuracy falls; by gold answers where the data have them."""
        result = results.get("sampled")
        if result is None or not self.alarms:
            return
        seen = [one for group in result.groups for one in _watched(group, None)]
        right = [one.right for one in seen if one.right is not None]
        accuracy = fmean(right) if right else result.accuracy
        if accuracy is not None:
            self._sound(step, self.alarms.evaluated(accuracy, len(right) or result.completions))

    def _sound(self, step: int, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            what = {"kind": alarm.kind, "reward": alarm.reward, "value": round(alarm.value, 4)}
            self.run.log.event("alarm", step=step, said=alarm.said, unshown=what | {"examples": alarm.examples})

    def draft_depth(self, step: int) -> int:
        """How deep the head learns."""
        return draft_depth(self.curriculum.options, self.deepest, step)

    def _score(self, groups: list[RolloutGroup], step: int) -> list[GroupScore]:
        try:
            return self.task.score(groups)
        except RewardFailed as error:
            self.run.log.event("reward_error", step=step, **vars(error.failure))
            raise

    def _metrics(self, step: int, drawn: Drawn) -> dict[str, float]:
        """curriculum/* of the options that are on, and group/* of dynamic sampling."""
        metrics, options = self.curriculum.metrics(step), self.curriculum.options
        if options.completion_tokens is not None:
            metrics["curriculum/completion_tokens"] = float(self._params(step).max_completion_tokens)
        if options.draft_depth is not None:
            metrics["curriculum/draft_depth"] = float(self.draft_depth(step))
        return metrics | (drawn.counts() if self.rollout.refill_draws else {})

    def _params(self, step: int) -> SamplingParams:
        """A head that has not learned deep drafts yet does not make them."""
        depth, drafts = self.draft_depth(step), self.sampling.draft_tokens
        limit = completion_tokens(self.curriculum.options, self.sampling.max_completion_tokens, step)
        if depth < self.deepest:
            drafts = depth if drafts is None else min(drafts, depth)
        params = replace(self.sampling, max_completion_tokens=limit, draft_tokens=drafts)
        return replace(params, head_accepted=self.head_accepted)

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


def _watched(group: RolloutGroup, score: GroupScore | None) -> list[Watched]:
    """The completions as the alarms see them; `score` is None where marks do not matter."""
    from grpo.algorithm.alarms import Watched

    prompt = group.prompt
    question, answer = str(prompt.columns.get("question", prompt.text)), prompt.columns.get("answer")
    marks = {"score": score.rewards} | score.parts if score else {}
    return [
        Watched.of(prompt.prompt_id, question, answer, c.text, c.token_ids, {name: of[i] for name, of in marks.items()})
        for i, c in enumerate(group.completions)
    ]
