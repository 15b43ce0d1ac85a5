"""The primitives of a training: a policy that learns, its samplers, and what a step does with them.

`quartet train` and `quartet sft` are loops over these (grpo/train.py, grpo/sft.py), and a loop of your own is the same
lines (contract 17).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.run import SftConfig, TrainConfig
from grpo.evaluation.best_point import BestPoint
from grpo.evaluation.evaluate import Evaluation
from grpo.evaluation.held_out import HeldOut, Result
from grpo.learner.batch import TrainingBatch
from grpo.learner.learner import Learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.learner.prepare import Advantages, recorded, supervised
from grpo.learner.row import PackedRow
from grpo.run import checkpoint
from grpo.run.metrics import rollout_metrics
from grpo.run.stop import signals
from grpo.source.policy_source import save_policy
from grpo.steps.ahead import Batches
from grpo.steps.collector import Collector
from grpo.steps.loop import Run
from grpo.steps.opening import grpo_session, open_run
from grpo.steps.pool import NoPool, open_run_pool, open_sampler, sampling_of, use_costs_of_run
from grpo.steps.publisher import Publisher, open_publisher, refuse_mismatch
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
    from grpo.learner.terms.term import Term


class Session:
    """A policy that learns and its samplers, as a configuration says: with its warm start, its curriculum and its
    schedule. Every rank of a run calls the same primitives in the same order, and gets the same values.

    With the configuration of `quartet sft`, and in a warm start, it learns from `solutions`, and samples only to
    evaluate.

    >>> with Session.open(TrainConfig(output_dir="runs/mine", steps=20)) as session:
    ...     for step in session.run.steps():
    ...         groups = session.sample(session.prompts(step), step=step)
    ...         batch = session.prepare(groups, session.score(groups))
    ...         metrics = session.forward_backward(batch) | session.optim_step()
    ...         session.publish()
    ...         session.record(step, metrics)
    """

    def __init__(
        self, run: Run[Any], task: Task, learner: Learner, collector: Collector, plain: Policy | None = None
    ) -> None:
        """`plain` shares the frozen weights, without adapters: what other sessions begin with."""
        self.run, self.task, self.learner, self.collector, self.config = run, task, learner, collector, run.config
        self.policy, self.ranks, self.plain = learner.policy, run.ranks, plain
        self.batches = Batches(run, collector, learner, self._publish)
        self.canaries: SamplingParams | None = None  # None: there are samplers only while it evaluates
        self.publisher: Publisher | None = None
        self.pool: Pool = NoPool()
        collector.pool = self.pool
        sampling = replace(sampling_of(run, self.policy, run.config.eval.samples), environment=task.actor.environment)
        self.held_out = HeldOut(task, self.policy, self.pool, run.log, sampling, self._evaluated)
        self._own_loss: tuple[Loss, Term] | None = None  # the last one, which may go on with the same batch
        self._prepared: tuple[Drawn, TrainingBatch] | None = None  # what the step learns from
        self._examples: list[str] = []  # whose solutions were taken last, where it learns from solutions
        self._of_grpo = " GRPO" if isinstance(self.config, TrainConfig) else ""
        self._drawn: TrainingBatch | None = None  # the same, where the run itself has sampled it

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
        """Everything that can be refused is refused before the folder is touched. The policy has its warm start,
        samplers hold its weights, and the held-out problems have been evaluated. With LoRA another session may be the
        `base`: both have the frozen weights of one policy, in memory once, each with adapters of its own."""
        flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
        with open_run(config, config.steps, **flags) as (run, task):
            from grpo.steps.supervise import supervised_session, warm_start

            if isinstance(config, SftConfig):
                session = supervised_session(cls, run, task)
            else:
                if base is None and config.warm_start.steps:
                    warm_start(run, task, cls, BestPoint)
                session = grpo_session(cls, run, task, base)
            with session.begun():
                yield session

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The steps are inside, after the first evaluation."""
        run, task = self.run, self.task
        with ExitStack() as stack:
            if self.canaries:
                self.publisher = stack.enter_context(open_publisher(run, self.learner, self.canaries))
                self.pool = self.publisher.pool
                self.collector.pool = stack.enter_context(open_sampler(run, task, self.pool))
                self.held_out.pool = stack.enter_context(open_sampler(run, task, self.pool))  # agents have a memory
                run.alone(use_costs_of_run, run, task, self.pool, self.policy, self.collector.sampling)
            stack.enter_context(run)
            self.batches.begin()
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
        self._publish_refused()
        drawn = self.batches.take(step)
        self.run.metrics |= drawn.metrics
        self.batches.go_on(step)
        return drawn

    def prompts(self, step: int, count: int | None = None, draw: int = 0) -> list[Prompt]:
        """The prompts of a step, `prompts_per_step` of them or `count`. `draw` counts refills within the step."""

        def choose() -> list[Prompt]:
            if draw == 0:
                self.collector.begin(step)
            return self.collector.prompts(count or self.config.prompts_per_step, step, draw)

        if draw == 0:
            self.batches.begins(step)
        return self.ranks.from_first(choose)

    def sample(self, prompts: Sequence[Prompt], *, step: int, draw: int = 0, **changes: Any) -> list[RolloutGroup]:
        """A group of completions of each prompt, a function of the weights, the seed, the step, the draw, the prompt
        and the place in the group (contract 4). `changes` are of SamplingParams, such as `group_size`."""

        def act() -> list[RolloutGroup]:
            params = replace(self.collector.params(step), **changes).at(step, draw)
            with self.run.timed("time/rollout"), self.run.log.progress() as progress:
                bar = progress.add_task(f"step {step}: sampling", total=len(prompts) * params.group_size)
                groups = self.collector.sample(prompts, params, partial(progress.advance, bar))
            self.collector.learn_drafts(groups)
            return groups

        self._publish_refused()
        return self.ranks.from_first(act)

    def score(
        self, groups: Sequence[RolloutGroup], rewards: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    ) -> list[GroupScore]:
        """The score of each group, by the rewards of the configuration or by other functions."""

        def act() -> list[GroupScore]:
            with self.run.timed("time/reward"):
                if rewards is not None:
                    scores = self.task.score_by(rewards, groups)
                    for failure in (failure for score in scores for failure in score.errors):
                        self.run.log.event("reward_error", step=self.step, **vars(failure))
                    return scores
                return self.collector.score(groups, self.step)

        return self.ranks.from_first(act)

    def solutions(self, count: int) -> list[PackedRow]:
        """Prompts of the training data with their gold solutions, the next ones in the order of the data."""
        token = self.policy.stop_token_ids[0]

        def take() -> tuple[list[str], list[PackedRow]]:
            examples: list[Example] = self.collector.stream.take(count)
            rows = [self.task.solution(example, self.policy.tokenizer, token) for example in examples]
            return [example.example_id for example in examples], rows

        self._examples, rows = self.ranks.from_first(take)
        return rows

    def group(self, prompt: Prompt | str, completions: Sequence[str]) -> RolloutGroup:
        """Texts as a group, as if the policy had sampled them now; each ends with the stop token."""
        tokenizer, stop = self.policy.tokenizer, self.policy.stop_token_ids[0]
        if isinstance(prompt, str):
            prompt = Prompt(prompt, prompt, tokenizer.encode(prompt), {})
        tokens = [[*tokenizer.encode(text, add_special_tokens=False), stop] for text in completions]
        [logprobs] = self.logprobs([prompt], [tokens])
        version = self.learner.policy_version
        texts = zip(tokens, logprobs, completions, strict=True)
        return RolloutGroup(prompt, [Completion(ids, of_ids, text, "stop", version) for ids, of_ids, text in texts])

    def logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Sequence[int]]]) -> list[Any]:
        """The policy's log-probability of each token of completions, given as token ids by prompt: [P][G][Lc]."""
        groups = [
            RolloutGroup(prompt, [Completion(list(ids), [0.0] * len(ids), "", "stop", 0) for ids in of_prompt])
            for prompt, of_prompt in zip(prompts, completions, strict=True)
        ]
        return logprobs_of_groups(self.policy, groups, self.config.rollout.temperature)

    def prepare(
        self,
        groups: Drawn | Sequence[RolloutGroup] | Sequence[PackedRow] | Sequence[Lesson],
        scores: Sequence[GroupScore] | None = None,
        advantages: Advantages | Sequence[Sequence[float]] | None = None,
    ) -> TrainingBatch:
        """The batch of a step: advantages by `loss.advantage`, or given for completions [P, G] or tokens [P, G, Lc].
        Rows of `solutions` become a batch for supervised steps, lessons that `quartet mtp` has recorded one for the
        draft head. Groups without scores are not recorded. Raises ValueError for a prompt of a held-out problem
        (contract 16), and for lessons where there is no draft head."""
        self.run.alone(self.pool.sleep)
        if isinstance(groups, Drawn):
            drawn = groups
        elif groups and isinstance(groups[0], PackedRow):
            rows = cast("Sequence[PackedRow]", groups)
            self._refuse_held_out(row.prompt_token_ids for row in rows)
            return supervised(rows, self.step)
        elif groups and not isinstance(groups[0], RolloutGroup):
            lessons = cast("Sequence[Lesson]", groups)
            self._refuse_held_out(token_ids for lesson in lessons for token_ids in lesson.prompts)
            if self.policy.mtp is None:
                raise ValueError("recorded lessons teach a draft head, and this policy has none: see quartet mtp")
            return recorded(lessons, self.step)
        else:
            sampled = cast("Sequence[RolloutGroup]", groups)
            self._refuse_held_out(group.prompt.token_ids for group in sampled)
            unscored = [GroupScore([0.0] * len(group.completions), {}) for group in sampled]
            drawn = Drawn(list(sampled), list(unscored if scores is None else scores), [0] * len(sampled))
            self.run.metrics |= rollout_metrics(drawn.groups, drawn.scores)
        self._examples = []
        with self.run.phase("learning"):
            batch = self.learner.prepare(drawn.groups, drawn.scores, advantages, self.step)
        self._drawn = batch if drawn is groups else None
        if scores is not None or drawn is groups:
            self._prepared = drawn, batch
            self._keep(drawn, batch)
            for listener in self.collector.listeners if self.ranks.first else ():
                self.run.metrics |= listener.learns(self.step, drawn, batch)
        return batch

    def _refuse_held_out(self, prompts: Iterable[Sequence[int]]) -> None:
        """Raises ValueError where the token ids of a held-out problem's prompt are among these."""
        held_out = {tuple(prompt.token_ids): prompt.prompt_id for prompt in self.held_out.prompts}
        for token_ids in prompts:
            if name := held_out.get(tuple(token_ids)):
                raise ValueError(f"{name} is held out, and nothing may be learned from it; take it out of the batch")

    # ---- learning ---------------------------------------------------------------------------------------------------

    def learn(self, batch: TrainingBatch) -> dict[str, float]:
        """`learner.updates_per_batch` times `forward_backward` and `optim_step`, while these move the policy."""
        metrics: dict[str, float] = {}
        last = self.learner.options.updates_per_batch
        for update in range(1, last + 1):
            before = self.learner.updates
            metrics |= self.forward_backward(batch) | self.optim_step(ends=update == last)
            if self.learner.updates == before:
                break
        return metrics

    def forward_backward(
        self,
        batch: TrainingBatch,
        loss: Loss | None = None,
        on_micro_batch: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Add the gradient of the loss to what waits for `optim_step`; see `Learner.forward_backward`, and `as_term`
        for losses of your own. A stop is heeded, and sampling ahead goes on, until the weights move."""
        term = None
        if loss is not None:
            from grpo.learner.terms.custom import as_term

            if self._own_loss is None or self._own_loss[0] != loss:
                self._own_loss = loss, as_term(loss, self.learner.terms[0])
            term = self._own_loss[1]
        moved = self.run.moved
        with self.run.log.progress() as progress:
            bar = progress.add_task(f"step {self.step}: learning", total=None)

            def advance(finished: int, total: int) -> None:
                progress.update(bar, completed=finished, total=total)
                if on_micro_batch:
                    on_micro_batch(finished, total)
                if not moved and finished * self.learner.options.updates_per_batch < total:
                    # Several ranks finish their step, which they are in together; so does a short one on solutions.
                    if self.ranks.size == 1 and not self._examples:
                        signals.check()
                    self.batches.go_on(self.step)

            metrics = self._learn(lambda: self.learner.forward_backward(batch, term, advance))
        if term is not None and term.teaches(batch):
            for listener in self.collector.listeners:
                listener.taught()
        first = self._drawn is batch and not (self.learner.updates or batch.age(self.learner.policy_version))
        if first and self.config.dtype == "float32" and self.config.rollout.quantization == "none":
            refuse_mismatch(self.policy, self.config.model, metrics)
        return metrics

    def optim_step(
        self,
        learning_rate: float | None = None,
        *,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        ends: bool = True,
    ) -> dict[str, float]:
        """Move the weights by the gradients that wait, at the schedule's rate or at `learning_rate`; where none waits,
        nothing moves. AdamW's other numbers hold from now on; weight decay is on matrices only. `ends`: no other update
        with the same batches follows in this step. From here on the step counts, whatever fails later."""
        if not self.run.moved:
            self.batches.before_update(self.step)
        numbers = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.learner.set_numbers(**{name: value for name, value in numbers.items() if value is not None})
        metrics = self._learn(lambda: self.learner.optim_step(learning_rate, ends=ends))
        self.run.reached()
        if ends and self.run.moved:
            self._keep_logprobs()
        return metrics

    def _learn(self, act: Callable[[], dict[str, float]]) -> dict[str, float]:
        rate = f"{'warm_start' if self.run.inner else 'learner'}.learning_rate"
        if self._examples:
            return self.run.learn(act, rate=rate, batch=self.run.folder / "events.jsonl", examples=self._examples)
        return self.run.learn(act, rate=rate, batch=rollout_path(self.run.folder, self.step))

    # ---- publishing, evaluating, keeping ----------------------------------------------------------------------------

    def publish(self) -> None:
        """The samplers get the weights, where they hold others. Of what is sampled ahead the schedule decides that, but
        for a step after which something is evaluated."""
        schedule = self.batches.ahead and self.batches.is_asked
        if not schedule or self._evaluates(self.step) or self.step == self.run.last:
            self.batches.settle()
            self._publish()

    def _publish(self, anew: bool = False) -> None:
        if self.publisher is not None:
            self.publisher.keep_up(self.run, anew)

    def _publish_refused(self) -> None:
        """Nothing is sampled with a version that was not admitted: it is published and checked again."""
        if self.publisher is not None and self.publisher.version is None:
            self._publish()

    def evaluate(self, problems: Sequence[Example] | None = None, when: str | None = None) -> dict[str, Evaluation]:
        """The held-out problems or others, by way of sampling and greedily, as metrics of the run; with `when` they are
        in its result under names of their own. Raises ValueError for a problem that was trained on (contract 16)."""
        if problems is not None:
            self.task.refuse_trained_on(problems)
        with ExitStack() as stack:
            if self.publisher is None:
                self.held_out.pool = stack.enter_context(closing(self.open_pool()))
            self._publish_refused()
            return self.ranks.from_first(lambda: self.held_out.evaluate(self.step, when, problems))

    def open_pool(self) -> Pool:
        """Samplers of the current weights, for a session that samples only to evaluate. Close them."""
        return open_run_pool(self.run, self.policy, prompts_per_shard=64)

    def evaluate_if_due(self, step: int) -> None:
        if self._evaluates(step):
            self.evaluate()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """The line of the step in metrics.jsonl; where nothing was learned, its completions say so, too."""
        self._keep_logprobs()
        self.run.record(metrics | self.pool.metrics() | self.task.lost())

    def save_if_due(self, step: int) -> None:
        """A checkpoint every `checkpoint.every` steps, at the end, and where an evaluation may find the best."""
        self.run.save_if_due(self._evaluates(step) and self.config.checkpoint.keep_best)

    def save(self, folder: Path | str) -> Path:
        """A checkpoint in `folder`, beside those of the run; the path for `load`."""
        return checkpoint.save(Path(folder), self.run.step, *self.run.state())

    def load(self, path: Path | str) -> None:
        """The policy, its optimizer, the order of the data and what listeners keep, as they were when this checkpoint
        was saved; the samplers get the weights. Raises CheckpointError for a damaged one, ValueError for another
        policy's."""
        self.batches.settle()
        self.run.load(checkpoint.load(Path(path), together=True))
        self._publish(anew=True)  # another policy may have had the same version
        self.batches.begin()

    def finish(self) -> Result:
        """Evaluate at the end, and write the policy to `output_dir/policy`."""
        run, held_out = self.run, self.held_out
        if held_out.prompts and not run.ended_before:
            self.batches.settle()
            self._publish()  # what a loop of one's own may not have done
            self.evaluate(when=f"after{self._of_grpo}")
        save_policy(self.policy, run.folder / "policy", run.last)
        self._save_best()
        return Result(run.folder, self.policy, held_out.results)

    def _evaluates(self, step: int) -> bool:
        return self.held_out.due(step, self.run.last)

    def _evaluated(self, step: int, results: Mapping[str, Evaluation]) -> None:
        for listener in self.collector.listeners:
            listener.evaluated(step, results)

    def _keep(
        self, drawn: Drawn, batch: TrainingBatch, policy_logprobs: Mapping[int, Sequence[float]] | None = None
    ) -> None:
        """The completions in the folder of the run."""
        self.run.log.rollouts(
            self.step,
            drawn.groups,
            drawn.scores,
            batch.advantages,
            draws=drawn.draws,
            backend=self.collector.backend,
            policy_logprobs=policy_logprobs,
        )

    def _keep_logprobs(self) -> None:
        """Once it was learned from them, the completions again, with the policy's log-probabilities."""
        if self._prepared is not None:
            self._keep(*self._prepared, self.learner.policy_logprobs)
        self._prepared = None

    def _save_best(self) -> None:
        run, learner = self.run, self.learner
        if (best := run.ranks.from_first(run.best_step)) is not None:
            stored = checkpoint.load(checkpoint.saved(run.checkpoints)[best], together=True)
            learner.load_state(stored.tensors, stored.state["learner"])
            save_policy(learner.policy, run.folder / "best_policy", best)
            run.log.event("best", step=best, folder=str(run.folder / "best_policy"))
