"""The primitives of a training: a policy that learns, its samplers, and what a step does with them.

`quartet train` and `quartet sft` are loops over these (grpo/train.py, grpo/sft.py), and a loop of your own is the same
lines (contract 17).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.run import SftConfig, TrainConfig
from grpo.data.prompts import encode_open
from grpo.data.trained_on import Register, record_trained_on, trained_on
from grpo.evaluation.best_point import BestPoint
from grpo.evaluation.evaluate import Evaluation
from grpo.evaluation.held_out import HeldOut, Result
from grpo.learner.batch import TrainingBatch
from grpo.learner.learner import Learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.learner.optimizer import refuse_numbers
from grpo.learner.prepare import Advantages, recorded, supervised
from grpo.learner.row import PackedRow
from grpo.learner.state import put_weights
from grpo.run import checkpoint
from grpo.run.metrics import rollout_metrics
from grpo.run.stop import signals
from grpo.source.policy_source import save_policy
from grpo.steps.ahead import Batches
from grpo.steps.collector import Collector
from grpo.steps.loop import Run
from grpo.steps.opening import grpo_session, open_run
from grpo.steps.pool import NoPool, open_run_pool, open_sampler, sampling_of, use_costs_of_run
from grpo.steps.step import Step
from grpo.steps.weight_sync import WeightSync, open_weight_sync, refuse_mismatch
from grpo.task.task import Task
from policies.policy import Policy
from rewards.data.examples import Example
from rewards.group_score import GroupScore
from rewards.records import rollout_path
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.pool import Pool
from rollout.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpo.learner.lessons import Lesson
    from grpo.learner.terms.custom import Loss


class Session:
    """A policy that learns and its samplers, as a configuration says: with its SFT stage, its curriculum and its
    schedule. Every rank of a run calls the same primitives in the same order, and gets the same values.

    With the configuration of `quartet sft`, and in an SFT stage, it learns from `solutions`, and samples only to
    evaluate.

    >>> with Session.open(TrainConfig(output_dir="runs/mine", steps=20)) as session:
    ...     for step in session.run.steps():
    ...         groups = session.sample(session.prompts(step), step=step)
    ...         batch = session.prepare(groups, session.score(groups))
    ...         metrics = session.forward_backward(batch) | session.optim_step()
    ...         session.sync_weights()
    ...         session.record(step, metrics)
    """

    def __init__(
        self, run: Run[Any], task: Task, learner: Learner, collector: Collector, plain: Policy | None = None
    ) -> None:
        """`plain` shares the frozen weights, without adapters: what other sessions begin with."""
        self.run, self.task, self.learner, self.collector, self.config = run, task, learner, collector, run.config
        self.policy, self.ranks, self.plain = learner.policy, run.ranks, plain
        self.batches = Batches(run, collector, learner, self._sync_weights)
        self.sync_check: SamplingParams | None = None  # None: there are samplers only while it evaluates
        self.weight_sync: WeightSync | None = None
        self.pool: Pool = NoPool()
        collector.pool = self.pool
        sampling = replace(sampling_of(run, self.policy, run.config.eval.samples), environment=task.actor.environment)
        self.held_out = HeldOut(task, self.policy, self.pool, run.log, sampling, self._evaluated)
        before = run.ranks.from_first(lambda: trained_on(run.folder)) if run.resumes else frozenset()
        self.register = Register(task.trained_on | before)
        self.register.evaluate(self.held_out.prompts)
        self._of_grpo = " GRPO" if isinstance(self.config, TrainConfig) else ""
        run.finish_step = self._finish_step

    @classmethod
    @contextmanager
    def open(
        cls,
        config: TrainConfig | SftConfig,
        *,
        base: Session | None = None,
        resume: str | None = None,
        stop_after: int | None = None,
        force: bool = False,
    ) -> Iterator[Self]:
        """Everything that can be refused is refused before the folder is touched. The policy has its SFT stage,
        samplers hold its weights, and the held-out problems have been evaluated. With LoRA another session may be the
        `base`: both have the frozen weights of one policy, in memory once, each with adapters of its own."""
        flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
        with open_run(config, config.steps, **flags) as (run, task):
            from grpo.steps.supervise import run_sft_stage, supervised_session

            if isinstance(config, SftConfig):
                session = supervised_session(cls, run, task)
            else:
                if base is None and config.sft.steps:
                    run_sft_stage(run, task, cls, BestPoint)
                session = grpo_session(cls, run, task, base)
            with session.start_steps():
                yield session

    @contextmanager
    def start_steps(self) -> Iterator[None]:
        """The steps are inside, after the first evaluation."""
        run, task = self.run, self.task
        with ExitStack() as stack:
            if self.sync_check:
                self.weight_sync = stack.enter_context(open_weight_sync(run, self.learner, self.sync_check))
                self.pool = self.weight_sync.pool
                self.collector.pool = stack.enter_context(open_sampler(run, task, self.pool))
                self.held_out.pool = stack.enter_context(open_sampler(run, task, self.pool))  # agents have a memory
                run.on_first_rank(use_costs_of_run, run, task, self.pool, self.policy, self.collector.sampling)
            stack.enter_context(run)
            self.batches.start_sampling()
            if self._evaluates(run.step) and not self.held_out.done(run.step):
                self.evaluate(when=f"before{self._of_grpo}" if run.step == 0 else None)
            yield

    @property
    def step(self) -> int:
        """The step in progress; between steps the last one."""
        return self.run.now

    # ---- what a step learns from ------------------------------------------------------------------------------------

    def draw(self, step: int) -> Drawn:
        """The prompts of a step, their groups and scores; tied groups are refilled, and what the next steps need is
        sampled ahead, as the configuration says."""
        self._sync_refused()
        drawn = self.batches.take_batch(int(step))
        self.run.metrics |= drawn.metrics
        if self.run.in_progress is not None:
            self._measure_batches(self.run.in_progress)  # what it has learned from already
        self._count_sampled(drawn.all_groups)
        self.batches.go_on(int(step))
        return drawn

    def prompts(self, step: int, count: int | None = None, draw: int = 0) -> list[Prompt]:
        """The prompts of a step, `prompts_per_step` of them or `count`. `draw` counts refills within the step."""
        size = self.config.prompts_per_step if count is None else count

        def choose() -> list[Prompt]:
            if draw == 0:
                self.collector.begin_step(step)
            return self.collector.prompts(size, step, draw) if size else []

        if draw == 0:
            self.batches.snapshot_before(int(step))
        return self.ranks.from_first(choose)

    def sample(self, prompts: Sequence[Prompt], *, step: int, draw: int = 0, **changes: Any) -> list[RolloutGroup]:
        """A group of completions of each prompt, a function of the weights, the seed, the step, the draw, the prompt
        and the place in the group (contract 4). `changes` are of SamplingParams, such as `group_size`. Raises
        ValueError for `accept="margin"`: no log-probability tells how likely an unverified draft was (contract 3)."""
        if changes.get("accept", "exact") != "exact":
            raise ValueError(
                f"accept={changes['accept']!r}: takes drafts unverified, so what it samples is not the policy's, and "
                "nothing may be learned from it; leave it out. quartet eval and sample have rollout.lossy_margin"
            )

        def act() -> list[RolloutGroup]:
            params = replace(self.collector.params(step), **changes).at(int(step), draw)
            with self.run.timed("time/rollout"), self.run.log.progress() as progress:
                bar = progress.add_task(f"step {step}: sampling", total=len(prompts) * params.group_size)
                groups = self.collector.sample(prompts, params, partial(progress.advance, bar))
            self.collector.learn_drafts(groups)
            return groups

        self.batches.wait_for_sampling()  # the samplers do one thing at a time
        self._sync_refused()
        groups = self.ranks.from_first(act)
        self._count_sampled(groups)
        return groups

    def _count_sampled(self, groups: Iterable[RolloutGroup]) -> None:
        if self.run.in_progress is None:
            return
        for group in groups:
            for completion in group.completions:
                self.run.in_progress.sampled += completion.num_sampled

    def score(
        self, groups: Sequence[RolloutGroup], rewards: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    ) -> list[GroupScore]:
        """The score of each group, by the rewards of the configuration or by other functions. Each failure is an
        event."""

        def act() -> list[GroupScore]:
            with self.run.timed("time/reward"):
                if rewards is None:
                    scores = self.collector.score(groups, self.step)
                else:
                    scores = self.task.score_by(rewards, groups)
                for failure in chain.from_iterable(score.errors for score in scores):
                    self.run.log.event("reward_error", step=self.step, **vars(failure))
                return scores

        return self.ranks.from_first(act)

    def solutions(self, count: int) -> list[PackedRow]:
        """Prompts of the training data with their gold solutions, the next ones in the order of the data."""
        token = self.policy.stop_token_ids[0]

        def take_solutions() -> list[PackedRow]:
            examples: list[Example] = self.collector.stream.take_examples(count)
            return [self.task.solution(example, self.policy.tokenizer, token) for example in examples]

        if self.run.in_progress is not None:
            self.batches.snapshot_before(int(self.step))
        return self.ranks.from_first(take_solutions)

    def group(self, prompt: Prompt | str, completions: Sequence[str]) -> RolloutGroup:
        """Texts as a group, as if the policy had sampled them now; each ends with the stop token. Raises ValueError
        without texts, and for a prompt without tokens."""
        if not completions:
            raise ValueError("completions=[]: a group needs at least one text")
        tokenizer, stop = self.policy.tokenizer, self.policy.stop_token_ids[0]
        if isinstance(prompt, str):
            prompt = Prompt(prompt, prompt, encode_open(prompt, tokenizer), {})
        if not prompt.token_ids:
            raise ValueError(f"the prompt {prompt.text!r} has no tokens, and a policy continues at least one")
        tokens = [[*tokenizer.encode(text, add_special_tokens=False), stop] for text in completions]
        [logprobs] = self.logprobs([prompt], [tokens])
        made = []
        for ids, of_ids, text in zip(tokens, logprobs, completions, strict=True):
            completion = Completion(ids, of_ids, text, "stop", self.learner.policy_version)
            completion.temperature = self.learner.likelihood.temperature
            made.append(completion)
        return RolloutGroup(prompt, made)

    def logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Sequence[int]]]) -> list[Any]:
        """The policy's log-probability of each token of completions, given as token ids by prompt: [P][G][Lc]."""
        groups = []
        for prompt, of_prompt in zip(prompts, completions, strict=True):
            read = [Completion(list(ids), [0.0] * len(ids), "", "stop", 0) for ids in of_prompt]
            groups.append(RolloutGroup(prompt, read))
        return logprobs_of_groups(self.policy, groups, self.learner.likelihood.temperature)

    def prepare(
        self,
        groups: Drawn | Sequence[RolloutGroup],
        scores: Sequence[GroupScore] | None = None,
        advantages: Advantages | Sequence[Sequence[float]] | None = None,
    ) -> TrainingBatch:
        """A batch of groups, with their scores, with advantages by `loss.advantage`, or with these advantages of
        completions [P, G] or tokens [P, G, Lc]. What `draw` returns has its scores, in whose place `scores` may be
        given. No groups make an empty batch.

        Nothing is written or remembered; groups without scores will not be recorded. Raises ValueError for what does
        not fit together, is not finite or was sampled at another temperature (`check_groups`), and for a prompt of a
        problem that is held out (contract 16).
        """
        if not isinstance(groups, Drawn) and groups and not isinstance(groups[0], RolloutGroup):
            return self._prepare_as_before(groups)
        by_run = False
        if isinstance(groups, Drawn):
            by_run = scores is None and bool(groups.metrics)  # which only a run measures
            scores = groups.scores if scores is None else scores
            draws = groups.draws if len(groups.draws) == len(groups.groups) else [0] * len(groups.groups)
            drawn = replace(groups, scores=list(scores), draws=draws)
        else:
            drawn = Drawn(list(groups), list(scores or ()), [0] * len(groups))
        self.register.refuse_learning(group.prompt for group in drawn.groups)
        with self.run.phase("learning"):
            batch = self.learner.prepare(drawn.groups, scores, advantages, int(self.step))
        return replace(batch, drawn=drawn, by_run=by_run)

    def _prepare_as_before(self, rows: Sequence[Any]) -> TrainingBatch:
        """Prepare rows and lessons, which `prepare` took in version 0.2."""
        of_solutions = isinstance(rows[0], PackedRow)
        name = "prepare_solutions" if of_solutions else "prepare_lessons"
        warnings.warn(f"prepare takes groups; use {name} for these", FutureWarning, stacklevel=3)
        return self.prepare_solutions(rows) if of_solutions else self.prepare_lessons(rows)

    def prepare_solutions(self, rows: Sequence[PackedRow]) -> TrainingBatch:
        """A batch of gold solutions, as `solutions` gives them, for supervised steps. Raises ValueError for a prompt of
        a problem that is held out."""
        self.register.refuse_learning(map(self._prompt_of_row, rows))
        return supervised(rows, int(self.step))

    def prepare_lessons(self, lessons: Sequence[Lesson]) -> TrainingBatch:
        """A batch for the draft head, of lessons that `quartet mtp` has recorded. Raises ValueError for a prompt of a
        problem that is held out, and where there is no draft head."""
        self.register.refuse_learning(map(self._prompt_of_ids, chain.from_iterable(each.prompts for each in lessons)))
        if self.policy.mtp is None:
            raise ValueError("recorded lessons teach a draft head, and this policy has none: see quartet mtp")
        return recorded(lessons, int(self.step))

    def _prompt_of_row(self, row: PackedRow) -> Prompt:
        return replace(self._prompt_of_ids(row.prompt_token_ids), prompt_id=row.example_id, fingerprint=row.fingerprint)

    def _prompt_of_ids(self, token_ids: Sequence[int]) -> Prompt:
        text = str(self.policy.tokenizer.decode(token_ids, skip_special_tokens=True))
        return Prompt("", text, list(token_ids))

    def _prompts_of(self, batch: TrainingBatch) -> list[Prompt]:
        if batch.drawn is not None:
            return [group.prompt for group in batch.drawn.groups]
        prompts = chain.from_iterable(lesson.prompts for lesson in batch.lessons)
        return [*map(self._prompt_of_row, batch.rows), *map(self._prompt_of_ids, prompts)]

    # ---- learning ---------------------------------------------------------------------------------------------------

    def learn(self, batch: TrainingBatch) -> dict[str, float]:
        """`learner.updates_per_batch` times `forward_backward` and `optim_step`, while these move the policy, and what
        is done once a step."""
        metrics: dict[str, float] = {}
        for _ in range(self.learner.options.updates_per_batch):
            before = self.learner.updates
            metrics |= self.forward_backward(batch) | self.optim_step()
            if self.learner.updates == before:
                break
        return metrics | self._finish_step()

    def forward_backward(
        self,
        batch: TrainingBatch,
        loss: Loss | None = None,
        on_micro_batch: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Add the gradient of the loss to what waits for `optim_step`; see `Learner.forward_backward`, and `as_term`
        for losses of your own. Samplers on the same GPU give up its memory first. The batch becomes one of the step's.
        A stop is heeded, and sampling ahead goes on, until the weights move."""
        self.run.on_first_rank(self.pool.sleep)
        self._join_step(batch)
        moved = self.run.moved
        with self.run.log.progress() as progress:
            bar = progress.add_task(f"step {self.step}: learning", total=None)

            def advance(finished: int, total: int) -> None:
                progress.update(bar, completed=finished, total=total)
                if on_micro_batch:
                    on_micro_batch(finished, total)
                if not moved and finished * self.learner.options.updates_per_batch < total:
                    # Several ranks finish their step, which they are in together; so does a short one on solutions.
                    if self.ranks.size == 1 and batch.from_rollouts:
                        signals.check()
                    self.batches.go_on(int(self.step))

            metrics = self._learn(lambda: self.learner.forward_backward(batch, loss, advance), batch)
        work = self.learner.work_of(batch, loss)
        if work is not None and self.run.in_progress is not None and work not in self.run.in_progress.read:
            self.run.in_progress.read.append(work)
        if work is not None and loss is not None:
            for callback in self.collector.callbacks:
                callback.on_custom_loss()
        first = batch.by_run and not (self.learner.updates or batch.age(self.learner.policy_version))
        if first and self.config.dtype == "float32" and self.config.rollout.quantization == "none":
            refuse_mismatch(self.policy, self.config.model, metrics)
        return metrics

    def _join_step(self, batch: TrainingBatch) -> None:
        """The step learns from this batch, too: its problems are registered, its completions are in rollouts/."""
        step = self.run.in_progress
        if step is not None and any(known is batch for known in step.batches):
            return
        if new := self.register.learn(self._prompts_of(batch)):
            self.run.on_first_rank(record_trained_on, self.run.folder, new)
        if step is None:  # its gradient waits for the first update of a step
            return
        step.batches.append(batch)
        drawn = batch.drawn
        if drawn is None or not drawn.groups:
            return
        self._measure_batches(step)
        if drawn.scores:
            step.kept = False
            self._keep_rollouts(step, learned=False)
            self.run.log.show_rollouts(int(step), drawn.groups, drawn.scores, batch.advantages)
            for callback in self.collector.callbacks if self.ranks.first else ():
                step.metrics |= callback.on_update_begin(int(step), drawn, batch)

    def _measure_batches(self, step: Step) -> None:
        """Rewards and lengths of all that the step learns from. Of a single batch the run may have measured more."""
        every, by_run = list[Drawn](), False
        groups, scores = list[RolloutGroup](), list[GroupScore]()
        for batch in step.batches:
            if batch.drawn is not None:
                every.append(batch.drawn)
                by_run = batch.by_run
                groups += batch.drawn.all_groups
                scores += batch.drawn.all_scores
        if len(every) == 1 and by_run:
            for name, value in every[0].metrics.items():
                if not name.startswith("time/"):
                    step.metrics[name] = value
        elif groups:
            step.metrics |= rollout_metrics(groups, scores)

    def optim_step(
        self,
        learning_rate: float | None = None,
        *,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
    ) -> dict[str, float]:
        """Move the weights by the gradients that wait, at the schedule's rate or at `learning_rate`; where none waits,
        nothing moves. AdamW's other numbers hold from now on; weight decay is on matrices only. From here on the step
        counts, whatever fails later. What is done once a step, such as moving the routers' biases, comes before the
        weights are used elsewhere or the step is recorded. Raises ValueError for numbers that would make weights NaN.
        """
        self.run.refuse_outside()
        numbers: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        numbers = {name: value for name, value in numbers.items() if value is not None}
        refuse_numbers(**numbers | ({} if learning_rate is None else {"learning_rate": learning_rate}))
        if not self.run.moved:
            self.batches.before_update(int(self.step))
        self.learner.set_numbers(**numbers)
        works, before = self.learner.waiting, self.learner.updates
        batch = works[-1].batch if works else None
        metrics = self._learn(lambda: self.learner.optim_step(learning_rate, step=int(self.step)), batch)
        if self.run.in_progress is not None and self.learner.updates != before:
            self.run.in_progress.moved, self.run.in_progress.kept = True, False
            known = self.run.in_progress.works
            known += [work for work in works if work not in known]
        self.run.reached()
        return metrics

    def _finish_step(self) -> dict[str, float]:
        """What is done once a step, before its weights are used elsewhere or it ends; nothing where it was done."""
        step = self.run.in_progress
        if step is None:
            return {}
        metrics: dict[str, float] = {}
        works, step.works = step.works, []
        if works:
            metrics = self._learn(lambda: self.learner.finish(works), works[-1].batch)
        if not step.kept:
            for work in self.learner.waiting:  # for an update of a later step
                self.learner.keep_logprobs(work)
            self._keep_rollouts(step, learned=True)
            step.kept = True
        return metrics

    def _learn(self, act: Callable[[], dict[str, float]], batch: TrainingBatch | None) -> dict[str, float]:
        rate = f"{'sft' if self.run.inner else 'learner'}.learning_rate"
        if batch is not None and batch.kind == "solutions":
            examples = [row.example_id for row in batch.rows]
            return self.run.learn(act, rate=rate, batch=self.run.folder / "events.jsonl", examples=examples)
        return self.run.learn(act, rate=rate, batch=rollout_path(self.run.folder, int(self.step)))

    # ---- publishing, evaluating, keeping ----------------------------------------------------------------------------

    def sync_weights(self) -> None:
        """The samplers get the weights, where they hold others. Of what is sampled ahead the schedule decides that, but
        for a step after which something is evaluated."""
        self._finish_step()
        schedule = self.batches.staleness and self.batches.is_asked
        if not schedule or self._evaluates(self.step) or self.step == self.run.last:
            self.batches.wait_for_sampling()
            self._sync_weights()

    def _sync_weights(self, anew: bool = False) -> None:
        if self.weight_sync is not None:
            self.weight_sync.keep_up(self.run, anew)

    def _sync_refused(self) -> None:
        """Nothing is sampled with a version that was not admitted: it is published and checked again. Samplers that
        have left the learner's GPUs get the weights anew."""
        if self.weight_sync is None:
            return
        if self.weight_sync.version is None or self.ranks.from_first(lambda: self.pool.asleep):
            self._finish_step()
            self._sync_weights()

    def evaluate(self, problems: Sequence[Example] | None = None, when: str | None = None) -> dict[str, Evaluation]:
        """The held-out problems, by way of sampling and greedily, as metrics of the run; with `when` they are in its
        result under names of their own. Or other `problems`: that answers, and is recorded nowhere.

        Raises ValueError for a problem that was learned from. From now on nothing is learned from these (contract 16).
        """
        step = int(self.step)
        prompts = [self.task.prompt(example, self.policy.tokenizer) for example in problems or ()]
        self.register.evaluate(prompts)
        self._finish_step()
        self.batches.wait_for_sampling()
        with ExitStack() as stack:
            if self.weight_sync is None:
                self.held_out.pool = stack.enter_context(closing(self.open_pool()))
            self._sync_refused()
            if problems is None:
                return self.ranks.from_first(lambda: self.held_out.evaluate(step, when))
            return self.ranks.from_first(lambda: self.held_out.answer(prompts, step))

    def open_pool(self) -> Pool:
        """Samplers of the current weights, for a session that samples only to evaluate. Close them."""
        return open_run_pool(self.run, self.policy, prompts_per_shard=64)

    def evaluate_if_due(self, step: int) -> None:
        self.run.refuse_other(step)
        if self._evaluates(step):
            self.evaluate()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """The line of the step in metrics.jsonl, and in rollouts/ what the policy gave the completions that it learned
        from. From here on the step counts. Raises ValueError for another step than the one in progress, and for one
        that has its line."""
        self.run.refuse_other(step)
        self._finish_step()
        self.run.record({**metrics, **self.pool.metrics(), **self.task.lost()})

    def save_if_due(self, step: int) -> None:
        """A checkpoint every `checkpoint.every` steps, at the end, and where an evaluation may find the best. Raises
        ValueError for another step than the one in progress."""
        self.run.refuse_other(step)
        self._finish_step()
        if self.run.step != step:  # it does not count yet, and has taken its prompts: no checkpoint has half a step
            return
        self.run.save_if_due(self._evaluates(step) and self.config.checkpoint.keep_best)

    def save(self, folder: Path | str) -> Path:
        """A checkpoint in `folder`, beside those of the run; the path for `load`."""
        self._finish_step()
        return checkpoint.save(Path(folder), self.run.step, *self.run.state())

    def load(self, path: Path | str) -> None:
        """The policy, its optimizer, the order of the data and what callbacks keep, as they were when this checkpoint
        was saved; the samplers get the weights, and gradients that wait are dropped. Raises CheckpointError for a
        damaged one, ValueError for another policy's."""
        self.batches.wait_for_sampling()
        self.run.load(checkpoint.load(Path(path), together=True))
        self.batches.snapshot_before(int(self.step), anew=True)  # a step that is undone goes back to here
        self._sync_weights(anew=True)  # another policy may have had the same version
        self.batches.start_sampling()

    def finish(self) -> Result:
        """Evaluate at the end, and write the policy to `output_dir/policy`. A step that the loop has left ends here."""
        run, held_out = self.run, self.held_out
        run.leave()
        if held_out.prompts and not run.ended_before:
            self.batches.wait_for_sampling()
            self._sync_weights()  # what a loop of one's own may not have done
            self.evaluate(when=f"after{self._of_grpo}")
        save_policy(self.policy, run.folder / "policy", run.last)
        self._save_best()
        return Result(run.folder, self.policy, held_out.results)

    def _evaluates(self, step: int) -> bool:
        return self.held_out.due(step, self.run.last)

    def _evaluated(self, step: int, results: Mapping[str, Evaluation]) -> None:
        for callback in self.collector.callbacks:
            callback.on_evaluate(step, results)

    def _keep_rollouts(self, step: Step, *, learned: bool) -> None:
        """The completions of all batches of the step with scores in the folder of the run; once something was learned,
        with the policy's log-probabilities."""
        groups, scores, draws = [], [], []
        advantages: list[Any] = []
        policy_logprobs: dict[int, list[float]] = {}
        completions = 0
        for batch in step.batches:
            if batch.drawn is None or not batch.drawn.scores:
                continue
            for work in step.read:
                if work not in batch.works:
                    continue
                for index, values in work.policy_logprobs.items():
                    policy_logprobs.setdefault(completions + index, values)  # the first loss counts
            groups += batch.drawn.groups
            scores += batch.drawn.scores
            draws += batch.drawn.draws
            advantages += batch.advantages
            for group in batch.drawn.groups:
                completions += len(group.completions)
        if groups:
            known = policy_logprobs if learned else None
            backend = self.collector.backend
            self.run.log.rollouts(int(step), groups, scores, advantages, draws, backend, known)

    def _save_best(self) -> None:
        """Save the weights of the best step as `best_policy`; the policy stays the one at the end."""
        run, learner = self.run, self.learner
        if (best := run.ranks.from_first(run.best_step)) is not None:
            stored = checkpoint.load(checkpoint.saved(run.checkpoints)[best], together=True)
            at_the_end = learner.copy_weights()
            put_weights(stored.tensors["policy"], learner.policy, learner.masters)
            save_policy(learner.policy, run.folder / "best_policy", best)
            put_weights(at_the_end, learner.policy, learner.masters)
            run.log.event("best", step=best, folder=str(run.folder / "best_policy"))
