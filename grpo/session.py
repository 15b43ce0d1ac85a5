"""The primitives of a training: a policy that learns, its samplers, and what a step does with them.

`quartet train` is a loop over these (grpo/train.py), and a loop of your own is the same lines (contract 17).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.run import TrainConfig
from grpo.data.examples import Example
from grpo.evaluation.evaluate import Evaluation
from grpo.evaluation.held_out import HeldOut, Result
from grpo.learner.batch import PackedRow, TrainingBatch
from grpo.learner.build import grpo_learner
from grpo.learner.learner import Learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.learner.prepare import Advantages, recorded, supervised
from grpo.run import checkpoint
from grpo.run.metrics import rollout_metrics
from grpo.run.records import rollout_path
from grpo.run.stop import signals
from grpo.source.policy_source import load_beside, save_policy
from grpo.steps.ahead import Batches
from grpo.steps.collector import Collector
from grpo.steps.listener import listeners_of
from grpo.steps.loop import Run
from grpo.steps.opening import base_weights, first_policy, open_run, shared_policy
from grpo.steps.pool import open_sampler, sampling_of, use_costs_of_run
from grpo.steps.publisher import Publisher, open_publisher, refuse_mismatch
from grpo.task.task import Task
from policies import four_bit
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.pool import Sampler

if TYPE_CHECKING:
    from grpo.learner.lessons import Lesson
    from grpo.learner.terms.custom import Loss
    from grpo.learner.terms.term import Term


class Session:
    """A policy that learns and its samplers, as a configuration says: with its warm start, its curriculum and its
    schedule. Every rank of a run calls the same primitives in the same order, and gets the same values.

    >>> with Session.open(TrainConfig(output_dir="runs/mine", steps=20)) as session:
    ...     for step in session.run.steps():
    ...         groups = session.sample(session.prompts(step), step=step)
    ...         batch = session.prepare(groups, session.score(groups))
    ...         metrics = session.forward_backward(batch) | session.optim_step()
    ...         session.publish()
    ...         session.record(step, metrics)
    """

    def __init__(self, run: Run[TrainConfig], task: Task, learner: Learner, plain: Policy | None = None) -> None:
        """`plain` shares the frozen weights, without adapters: what other sessions begin with."""
        self.run, self.task, self.learner, self.config = run, task, learner, run.config
        self.policy, self.ranks, self.plain = learner.policy, run.ranks, plain
        self.collector = Collector(run, task, learner.policy, listeners_of(run, task))
        self.batches = Batches(run, self.collector, learner, self._publish)
        self._own_loss: tuple[Loss, Term] | None = None  # the last one, which may go on with the same batch
        self._prepared: tuple[Drawn, TrainingBatch] | None = None  # what the step learns from
        self._drawn: TrainingBatch | None = None  # the same, where the run itself has sampled it

    @classmethod
    @contextmanager
    def open(
        cls,
        config: TrainConfig,
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
            config, ranks = run.config, run.ranks
            if base is None and config.warm_start.steps:
                from grpo.steps.supervise import warm_start

                warm_start(run, task)
            start = str(run.folder / "warm_start") if config.warm_start.steps else None
            again, beside = partial(first_policy, run, task, start), partial(load_beside, config)
            policy = again() if base is None else shared_policy(run, base.plain, base.run)
            counts = four_bit.counts(policy.trunk)
            if counts["in_4_bits"]:
                run.log.event("base_in_4_bits", **counts)
            plain = policy.sharing(head=True) if config.lora and ranks.layout is None else None
            learner: Learner = grpo_learner(policy, config, task.reward_weights, ranks, again, beside)
            session = cls(run, task, learner, plain)
            run.restore(learner=learner, curriculum=session.batches, **base_weights(run, learner))
            with (
                open_publisher(run, learner, sampling_of(run, policy, 1)) as publisher,
                open_sampler(run, task, publisher.pool) as sampler,
                open_sampler(run, task, publisher.pool) as examiner,  # an agent may remember what it has met
            ):
                session._begin(publisher, sampler, examiner)
                with run:
                    session.batches.begin()
                    session._evaluate_first()
                    yield session

    def _begin(self, publisher: Publisher, sampler: Sampler, examiner: Sampler) -> None:
        """Samplers hold the weights; measure what their drafts cost."""
        config, policy, run = self.config, self.policy, self.run
        self.publisher, self.pool, self.collector.pool = publisher, publisher.pool, sampler
        run.alone(use_costs_of_run, run, self.pool, policy, self.collector.sampling, self.collector.longest_prompt)
        sampling = replace(sampling_of(run, policy, config.eval.samples), environment=self.task.actor.environment)
        log, every = run.log, config.eval.every
        self.held_out = HeldOut(self.task, policy, examiner, log, sampling, every, self._evaluated)

    @property
    def step(self) -> int:
        """The step in progress; between steps the last one."""
        return self.run.now

    # ---- what a step learns from ------------------------------------------------------------------------------------

    def draw(self, step: int) -> Drawn:
        """The prompts of a step, their groups and scores; tied groups are refilled, and what the next steps need is
        sampled ahead, as the configuration says."""
        drawn = self.batches.take(step)
        self.run.metrics |= drawn.metrics
        self.run.alone(self.pool.sleep)
        self.batches.go_on(step)
        return drawn

    def prompts(self, step: int, count: int | None = None, draw: int = 0) -> list[Prompt]:
        """The prompts of a step, `prompts_per_step` of them or `count`. `draw` counts refills within the step."""

        def choose() -> list[Prompt]:
            if draw == 0:
                self.collector.begin(step)
            return self.collector.prompts(count or self.config.prompts_per_step, step, draw)

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

        groups = self.ranks.from_first(act)
        self.run.alone(self.pool.sleep)
        return groups

    def score(
        self, groups: Sequence[RolloutGroup], rewards: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    ) -> list[GroupScore]:
        """The score of each group, by the rewards of the configuration or by other functions."""

        def act() -> list[GroupScore]:
            with self.run.timed("time/reward"):
                if rewards is not None:
                    return self.task.score_by(rewards, groups)
                return self.collector.score(groups, self.step)

        return self.ranks.from_first(act)

    def solutions(self, count: int) -> list[PackedRow]:
        """Prompts of the training data with their gold solutions, the next ones in the order of the data."""
        token = self.policy.stop_token_ids[0]

        def take() -> list[PackedRow]:
            examples: list[Example] = self.collector.stream.take(count)
            return [self.task.solution(example, self.policy.tokenizer, token) for example in examples]

        return self.ranks.from_first(take)

    def group(self, prompt: Prompt | str, completions: Sequence[str]) -> RolloutGroup:
        """Texts as a group, as if they had been sampled; each ends with the stop token. Their log-probabilities are not
        known, and stand as 0."""
        tokenizer, stop = self.policy.tokenizer, self.policy.stop_token_ids[0]
        if isinstance(prompt, str):
            prompt = Prompt(prompt, prompt, tokenizer.encode(prompt), {})
        tokens = [[*tokenizer.encode(text, add_special_tokens=False), stop] for text in completions]
        return RolloutGroup(prompt, [_given(ids, text) for ids, text in zip(tokens, completions, strict=True)])

    def logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Sequence[int]]]) -> list[Any]:
        """The policy's log-probability of each token of completions, given as token ids by prompt: [P][G][Lc]."""
        groups = [
            RolloutGroup(prompt, [_given(list(ids)) for ids in of_prompt])
            for prompt, of_prompt in zip(prompts, completions, strict=True)
        ]
        return logprobs_of_groups(self.policy, groups, self.config.rollout.temperature)

    def prepare(
        self,
        groups: Drawn | Sequence[RolloutGroup] | Sequence[PackedRow] | Sequence[Lesson],
        scores: Sequence[GroupScore] | None = None,
        advantages: Advantages | None = None,
    ) -> TrainingBatch:
        """The batch of a step: advantages by `loss.advantage`, or given for completions [P, G] or tokens [P, G, Lc].
        Rows of `solutions` become a batch for supervised steps, lessons that `quartet mtp` has recorded one for the
        draft head. Groups without scores are not recorded. Raises ValueError for a prompt of a held-out problem
        (contract 16), and for lessons where there is no draft head."""
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
                raise ValueError("recorded lessons teach a draft head, and this policy has none; set add_mtp")
            return recorded(lessons, self.step)
        else:
            sampled = cast("Sequence[RolloutGroup]", groups)
            self._refuse_held_out(group.prompt.token_ids for group in sampled)
            unscored = [GroupScore([0.0] * len(group.completions), {}) for group in sampled]
            drawn = Drawn(list(sampled), list(unscored if scores is None else scores), [0] * len(sampled))
            self.run.metrics |= rollout_metrics(drawn.groups, drawn.scores)
        with self.run.phase("learning"):
            batch = self.learner.prepare(drawn.groups, drawn.scores, advantages, self.step)
            for listener in self.collector.listeners:
                batch = listener.prepare(batch)
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
        last = self.config.learner.updates_per_batch
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
                if not moved and finished * self.config.learner.updates_per_batch < total:
                    if self.ranks.size == 1:  # several ranks finish their step: they are in it together
                        signals.check()
                    self.batches.go_on(self.step)

            metrics = self._learn(lambda: self.learner.forward_backward(batch, term, advance))
        exact = self.config.dtype == "float32" and self.config.rollout.quantization == "none"
        if exact and self._drawn is batch and not (self.learner.updates or batch.age(self.learner.policy_version)):
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
        changes = {name: value for name, value in (("betas", betas), ("eps", eps)) if value is not None}
        for group in self.learner.optimizer.param_groups:
            group.update(changes)
            if weight_decay is not None and all(weight.dim() > 1 for weight in group["params"]):
                group["weight_decay"] = weight_decay
        metrics = self._learn(lambda: self.learner.optim_step(learning_rate, ends=ends))
        self.run.reached()
        if ends and self.run.moved:
            self._keep_logprobs()
        return metrics

    def _learn(self, act: Callable[[], dict[str, float]]) -> dict[str, float]:
        file = rollout_path(self.run.folder, self.step)
        return self.run.learn(act, rate="learner.learning_rate", batch=file)

    # ---- publishing, evaluating, keeping ----------------------------------------------------------------------------

    def publish(self) -> None:
        """The samplers get the weights, where they hold others. Of what is sampled ahead the schedule decides that, but
        for a step after which something is evaluated."""
        if not self.batches.ahead or self._evaluates(self.step) or self.step == self.run.last:
            self.batches.settle()
            self._publish()

    def _publish(self) -> None:
        self.publisher.keep_up(self.run)

    def evaluate(self, problems: Sequence[Example] | None = None, when: str | None = None) -> dict[str, Evaluation]:
        """The held-out problems or others, by way of sampling and greedily, as metrics of the run; with `when` they are
        in its result under names of their own. Raises ValueError for a problem that was trained on (contract 16)."""
        if problems is not None:
            self.task.refuse_trained_on(problems)
        return self.ranks.from_first(lambda: self.held_out.evaluate(self.step, when, problems))

    def evaluate_if_due(self, step: int) -> None:
        if self._evaluates(step):
            self.run.alone(self.held_out.evaluate, step)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """The line of the step in metrics.jsonl; where nothing was learned, its completions say so, too."""
        self._keep_logprobs()
        self.run.record(metrics | self.pool.metrics() | self.task.lost())

    def save_if_due(self, step: int) -> None:
        """A checkpoint every `checkpoint.every` steps, at the end, and where an evaluation may find the best."""
        self.run.save_if_due(self.config.checkpoint.keep_best and self._evaluates(step))

    def save(self, folder: Path | str) -> Path:
        """A checkpoint in `folder`, beside those of the run; the path for `load`."""
        return checkpoint.save(Path(folder), self.run.step, *self.run.state())

    def load(self, path: Path | str) -> None:
        """The policy, its optimizer, the order of the data and what listeners keep, as they were when this checkpoint
        was saved; the samplers get the weights. Raises CheckpointError for a damaged one, ValueError for another
        policy's."""
        self.batches.settle()
        self.run.load(checkpoint.load(Path(path), together=True))
        self.publisher.version = None  # another policy may have had the same
        self._publish()
        self.batches.begin()

    def finish(self) -> Result:
        """Evaluate at the end, and write the policy to `output_dir/policy`."""
        run, config = self.run, self.config
        if not run.ended_before:
            run.alone(self.held_out.evaluate, run.last, "after GRPO")
        speeds = self.held_out.speeds() if config.log.measure_speed and self.ranks.first else []
        save_policy(self.policy, run.folder / "policy", run.last)
        if config.checkpoint.keep_best:
            self._save_best()
        return Result(run.folder, self.policy, self.held_out.results, speeds)

    def _evaluate_first(self) -> None:
        step = self.run.step
        if self._evaluates(step) and not self.held_out.done(step):
            self.run.alone(self.held_out.evaluate, step, "before GRPO" if step == 0 else None)

    def _evaluates(self, step: int) -> bool:
        return self.held_out.due(step, self.run.last)

    def _evaluated(self, step: int, results: Any) -> None:
        for listener in self.collector.listeners:
            listener.evaluated(step, results)

    def _keep(self, drawn: Drawn, batch: TrainingBatch, policy_logprobs: Any = None) -> None:
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


def _given(token_ids: list[int], text: str = "") -> Completion:
    return Completion(token_ids, [0.0] * len(token_ids), text, "stop", 0)
