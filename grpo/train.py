"""A run of GRPO from beginning to end: warm start, then sample, score, learn, publish, and again."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import psutil
import torch
from rich.progress import Progress

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.collector import Collector
from grpo.config.options import dump_yaml
from grpo.config.run import TrainConfig
from grpo.data.curriculum import Curriculum
from grpo.evaluation.evaluate import Evaluation, evaluate_run, measure_speed
from grpo.learner.learner import Learner
from grpo.learner.optimizer import schedule
from grpo.learner.parallel import ALONE, Ranks
from grpo.loader import check_options, load_policy, sampling_params
from grpo.non_finite import take_step
from grpo.policy_source import save_policy
from grpo.run import checkpoint
from grpo.run.best import best_step
from grpo.run.lock import RunLock
from grpo.run.log import RunLog, read_metrics
from grpo.run.metrics import rollout_metrics
from grpo.run.pool import open_run_pool, use_costs_of_run
from grpo.run.resume import base_changed, base_digest, saved_state
from grpo.run.reward_record import record_rewards, refuse_changed_rewards
from grpo.run.stop import Boundary, GivenUp, StopSignal
from grpo.run.threads import with_threads
from grpo.task import Task
from grpo.tied_steps import TiedSteps
from grpo.warm_start import warm_start
from policies.files.digests import write_digests
from policies.policy import Policy
from rewards.group_score import RewardFailed
from rollout.group import Prompt
from rollout.pool import Pool
from rollout.sampling import SamplingParams


def grpo_learner(
    policy: Policy, config: TrainConfig, reward_weights: dict[str, float] | None = None, ranks: Ranks = ALONE
) -> Learner:
    """The learner of a run, around a policy without adapters. `reward_weights` are for `Learner.prepare` alone."""
    torch.manual_seed(config.seed)  # the first values of adapters and of the value head are drawn
    if config.lora:
        policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
    return Learner(
        policy,
        config.learner,
        config.mtp,
        config.loss,
        balance=config.balance,
        value=config.value,
        temperature=config.rollout.temperature,
        max_completion_tokens=config.rollout.max_completion_tokens,
        reward_weights=reward_weights,
        schedule=schedule(config.learner.schedule, config.steps, config.learner.warmup_steps),
        ranks=ranks,
    )


class Trainer:
    """One run in one folder. `Trainer(config).run()`; everything that can be refused is refused in the constructor."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: str | None = None,
        stop_after: int | None = None,
        force: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        config = with_threads(config, resume)
        self.config, self.stop_after, self.resuming, self.ranks = config, stop_after, resume is not None, ranks
        self.force = force
        self.output_dir = config.output_dir
        self.checkpoints = self.output_dir / "checkpoints"
        self.stop = StopSignal()
        self.evaluations: dict[str, Evaluation] = {}
        check_options(config)
        self.lock = RunLock(self.output_dir)
        try:
            self._open(resume, stop_after, force)
        except BaseException:
            self.lock.release()
            raise

    def _open(self, resume: str | None, stop_after: int | None, force: bool) -> None:
        config = self.config
        self.saved = saved_state(config, resume=resume, force=force, stop_after=stop_after, steps=config.steps)
        self.start = self.saved.step if self.saved else 0
        self.task = Task.of(config)
        self.tied_steps = TiedSteps(config, self.task.first_reward, self.task.full_marks)
        try:
            if self.resuming and not force:
                refuse_changed_rewards(self.output_dir, self.task.scorer.describe())
            self.run_log = RunLog(
                self.output_dir,
                dump_yaml(config),
                table_every=config.log.table_every,
                trackers=config.log.trackers,
                resume_step=self.start if self.resuming else None,
                lock=self.lock,
                unwritten=self.saved.state.get("unwritten") if self.saved else None,
            )
            record_rewards(self.run_log, self.task.scorer.describe())
            self.task.record_split(self.run_log)
        except BaseException:
            self.task.close()
            raise

    def run(self) -> dict[str, Any]:
        """Returns what the summary shows. Raises Stopped when the run was asked to end early."""
        try:
            with self.run_log.until_its_end(), self.stop:
                return self._run()
        except GivenUp:  # before the steps
            raise self.stop.stopped(self.start) from None
        finally:
            self.task.close()
            self.run_log.close()

    def _run(self) -> dict[str, Any]:
        config, policy = self.config, self._initial_policy()
        self.ranks.begin("grpo", policy)
        learner = grpo_learner(policy, config, self.task.reward_weights, self.ranks)
        curriculum = Curriculum(self.task.train, config.curriculum, config.seed)
        if self.saved:
            learner.load_state(self.saved.tensors, self.saved.state["learner"])
            self._check_base(policy, self.saved)
            curriculum.load_state_dict(self.saved.state["curriculum"])
            checkpoint.discard_after(self.checkpoints, self.start)
        if config.lora:
            self.base = base_digest(policy, learner.state()[0]["policy"])
        self.ranks.hand_over(learner)
        pool = open_run_pool(policy, config, self.stop, self.run_log)
        try:
            pool.publish(learner.weights(), learner.policy_version)
            use_costs_of_run(pool, policy, config, resumes=self.resuming)
            return self._steps(learner, curriculum, pool)
        finally:
            pool.close()

    def _check_base(self, policy: Policy, saved: checkpoint.Checkpoint) -> None:
        """Adapters mean something on their own base weights alone. Raises ValueError for others, unless forced."""
        warm = f"warm start {self.output_dir / 'warm_start'}"
        changed = base_changed(policy, saved, warm if self.config.warm_start.steps else f"model={self.config.model!r}")
        if changed and not self.force:
            raise ValueError(f"{changed}, or use --force to go on with the new ones")
        if changed:
            self.run_log.event("base_changed", step=saved.step, what=changed)

    def _initial_policy(self) -> Policy:
        """The policy that GRPO starts from: warm-started now, or by the run that is being resumed."""
        config, folder = self.config, self.output_dir / "warm_start"
        if config.warm_start.steps == 0:
            return self._load(config)
        steps = self.output_dir / "warm_start_checkpoints"
        if not self.resuming or folder.exists():
            shutil.rmtree(steps, ignore_errors=True)
        if not (self.resuming and folder.exists()):
            found = checkpoint.find(steps, "auto")
            policy = self._load(config)
            results = warm_start(
                policy,
                self.task,
                config,
                self.run_log,
                checkpoints=steps,
                saved=checkpoint.load(found) if found else None,
                stop=self.stop,
                ranks=self.ranks,
            )
            self.run_log.event("warm_start_done", seconds=round(results["seconds"], 1), folder=str(folder))
            policy.save(folder)
            write_digests(folder)
            shutil.rmtree(steps, ignore_errors=True)
            return load_policy(config.model_copy(update={"model": str(folder)}))
        return self._load(config.model_copy(update={"model": str(folder)}))

    def _load(self, config: TrainConfig) -> Policy:
        policy = load_policy(config, self.task.corpus())
        self.task.check_lengths(policy, config.rollout.max_completion_tokens)
        return policy

    def _steps(self, learner: Learner, curriculum: Curriculum, pool: Pool) -> dict[str, Any]:
        config, tokenizer, start = self.config, learner.policy.tokenizer, self.start
        sampling = sampling_params(learner.policy, config.rollout, config.rollout.group_size, config.seed)
        sampling = replace(sampling, record_routing=config.learner.routing_replay)
        heldout = [self.task.prompt(example, tokenizer) for example in self.task.heldout]
        collector = Collector(config, self.task, curriculum, pool, sampling, tokenizer)
        finished_before = start == config.steps and (self.output_dir / "policy").exists()
        with Boundary(start, lambda step: self._save(step, learner, curriculum), self.run_log, self.stop) as boundary:
            if self._evaluation_due(start) and not self._evaluated(start):
                self._evaluate(pool, heldout, sampling, start)
            for step in range(start + 1, config.steps + 1):
                self._step(step, learner, collector, boundary)
                evaluating = self._evaluation_due(step)
                if self._checkpoint_due(step, evaluating):
                    boundary.save()
                if evaluating:
                    self._evaluate(pool, heldout, sampling, step)
                if step == self.stop_after and step < config.steps:
                    raise boundary.stopped()
            if heldout and not finished_before:
                self._evaluate(pool, heldout, sampling, config.steps)
            summary: dict[str, Any] = {"output_dir": str(self.output_dir), "evaluations": self.evaluations}
            if config.log.measure_speed and heldout and sampling.draft_tokens != 0:
                summary["speeds"] = measure_speed(pool, heldout, sampling, rows=(1, 8, 32))
        save_policy(learner.policy, self.output_dir / "policy", config.steps)
        if config.checkpoint.keep_best:
            self._save_best_policy(learner)
        return summary

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _step(self, step: int, learner: Learner, collector: Collector, boundary: Boundary) -> None:
        """Sample, score, learn, publish: one step of GRPO and its line in the log.

        Whatever ends it before the first update (GivenUp where a stop was asked for, a reward that fails) leaves the
        curriculum as it was. After that the step is reached, and has its line.
        """
        run_log, pool, updates = self.run_log, collector.pool, learner.updates
        times: defaultdict[str, float] = defaultdict(float)
        started, before = time.perf_counter(), collector.curriculum.state_dict()
        self.ranks.call(learner, "set_draft_depth", collector.draft_depth(step))
        self.task.reached(step - 1, self.config)
        learned: dict[str, float] = {}
        try:
            with run_log.progress() as progress:
                drawn = self._collect(step, collector, progress, times)
                self.stop.check()
                batch = learner.prepare(drawn.groups, drawn.scores)
                run_log.rollouts(step, drawn.groups, drawn.scores, batch.advantages, draws=drawn.draws)
                if told := self.tied_steps.observe(drawn, batch.advantages):
                    run_log.nothing_learned(step, *told)
                bar = progress.add_task(f"step {step}: learning", total=None)

                def advance(finished: int, total: int) -> None:
                    progress.update(bar, completed=finished, total=total)
                    in_first_update = finished * self.config.learner.updates_per_batch <= total
                    if self.ranks.size == 1 and in_first_update and finished < total:
                        self.stop.check()  # several ranks finish their step: they are in it together

                learned = self._learn(learner, batch, step, advance)
            boundary.reached(step)
            clock = time.perf_counter()
            if learner.updates != updates:
                pool.publish(learner.weights(), learner.policy_version)
            times["time/publish"] = time.perf_counter() - clock
        finally:
            if boundary.step == step or learner.updates != updates:  # also where it was cut short after an update
                boundary.reached(step)
                times["time/step"] = time.perf_counter() - started
                self._record(step, drawn, collector, learned | times)
            else:
                collector.curriculum.load_state_dict(before)

    def _collect(self, step: int, collector: Collector, progress: Progress, times: defaultdict[str, float]) -> Drawn:
        """The scored groups of a step, with an event for every reward that failed."""
        try:
            drawn = collector.collect(step, progress, times)
        except RewardFailed as error:
            self.run_log.event("reward_error", step=step, **vars(error.failure))
            raise
        for failure in (failure for score in drawn.all_scores for failure in score.errors):
            self.run_log.event("reward_error", step=step, **vars(failure))
        return drawn

    def _record(self, step: int, drawn: Drawn, collector: Collector, learned: dict[str, float]) -> None:
        metrics = rollout_metrics(drawn.all_groups, drawn.all_scores) | learned
        metrics |= collector.metrics(step, drawn) | collector.pool.metrics()
        metrics["speed/completion_tokens_per_second"] = metrics["completion/tokens"] / metrics["time/rollout"]
        metrics["memory/rss_gib"] = psutil.Process().memory_info().rss / 2**30
        if torch.cuda.is_available():
            metrics["memory/device_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.run_log.step(step, metrics)

    def _learn(self, learner: Learner, batch: Any, step: int, advance: Any) -> dict[str, float]:
        return take_step(
            learner,
            step,
            lambda: self.ranks.call(learner, "step", batch, step, own=(advance,)),
            self.run_log,
            batch=self.output_dir / "rollouts" / f"step_{step:06d}.jsonl.zst",
            rate="learner.learning_rate",
        )

    # ---- between steps ----------------------------------------------------------------------------------------------

    def _evaluation_due(self, step: int) -> bool:
        """Before the first step and every so often; the evaluation behind the last step is not meant here."""
        every = self.config.eval.every
        return bool(self.task.heldout) and step < self.config.steps and (step == 0 or bool(every and step % every == 0))

    def _evaluated(self, step: int) -> bool:
        """A run that was cut off between a checkpoint and its evaluation has it still before it."""
        return any(line["step"] == step and "eval/prompts" in line for line in read_metrics(self.output_dir))

    def _evaluate(
        self, pool: Pool, prompts: list[Prompt], sampling: SamplingParams, step: int
    ) -> dict[str, Evaluation]:
        self.task.reached(step, self.config)
        results = evaluate_run(pool, self.task, prompts, sampling, self.config.eval, self.run_log, step)
        when = {0: "before GRPO", self.config.steps: "after GRPO"}.get(step)
        if when:
            self.evaluations |= {f"{when}, {name}": result for name, result in results.items()}
        return results

    def _checkpoint_due(self, step: int, evaluating: bool) -> bool:
        options = self.config.checkpoint
        due = step % options.every == 0 or step in (self.config.steps, self.stop_after)
        return due or (options.keep_best and evaluating)

    def _best_step(self, *being_saved: int) -> int | None:
        evaluated = self.task.heldout and self.config.eval.every
        window = None if evaluated else self.config.checkpoint.every
        return best_step(read_metrics(self.output_dir), [*checkpoint.saved(self.checkpoints), *being_saved], window)

    def _save(self, step: int, learner: Learner, curriculum: Curriculum) -> None:
        options = self.config.checkpoint
        tensors, state = learner.state()
        everything: dict[str, Any] = {"learner": state, "curriculum": curriculum.state_dict(), **self.run_log.state()}
        if self.config.lora:
            everything["base"] = self.base
        best = self._best_step(step) if options.keep_best else None
        protect = [] if best is None else [best]
        checkpoint.save(self.checkpoints, step, tensors, everything, keep=options.keep, protect=protect)

    def _save_best_policy(self, learner: Learner) -> None:
        best = self._best_step()
        if best is not None:
            found = checkpoint.load(checkpoint.saved(self.checkpoints)[best])
            learner.load_state(found.tensors, found.state["learner"])
            save_policy(learner.policy, self.output_dir / "best_policy", best)
            self.run_log.event("best", step=best, folder=str(self.output_dir / "best_policy"))
