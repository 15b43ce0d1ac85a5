"""A run of GRPO from beginning to end: warm start, then sample, score, learn, publish, and again."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import yaml

from grpo import checkpoint
from grpo.config import SftConfig, TrainConfig
from grpo.evaluate import Evaluation, as_metrics, evaluate_both_ways, measure_speed
from grpo.learner import Learner, NonFiniteStep
from grpo.loader import check_model, load_policy, policy_folder, sampling_params
from grpo.metrics import rollout_metrics
from grpo.optimizer import schedule
from grpo.options import dump_yaml
from grpo.prompts import PromptStream
from grpo.run_log import RunLog
from grpo.task import Task
from grpo.warm_start import warm_start
from policies.policy import Policy
from rollout.group import Prompt
from rollout.pool import Pool, open_pool
from rollout.sampling import SamplingParams

FREE_TO_CHANGE = ("output_dir", "steps", "log", "checkpoint", "eval", "threads", "reward.timeout_s", "reward.workers")


class Stopped(Exception):
    """SIGTERM or --stop_after ended the run between two steps; everything up to here is saved."""


class Trainer:
    """One run in one folder. `Trainer(config).run()`; everything that can be refused is refused in the constructor."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: str | None = None,
        stop_after: int | None = None,
        force: bool = False,
    ) -> None:
        self.config, self.stop_after, self.resuming = config, stop_after, resume is not None
        self.output_dir = config.output_dir
        self.checkpoints = self.output_dir / "checkpoints"
        self.saved: checkpoint.Checkpoint | None = None
        self.terminated = False
        check_model(policy_folder(config.model))
        if resume is not None:
            found = checkpoint.find(self.checkpoints, resume)
            self.saved = checkpoint.load(found) if found else None
            if (self.output_dir / "config.yaml").exists() and not force:
                refuse_changed_config(self.output_dir / "config.yaml", config)
        self.task = Task.of(config)
        try:
            self.run_log = RunLog(
                self.output_dir,
                dump_yaml(config),
                table_every=config.log.table_every,
                trackers=config.log.trackers,
                resume_step=(self.saved.step if self.saved else 0) if self.resuming else None,
            )
        except BaseException:
            self.task.close()
            raise

    def run(self) -> dict[str, Any]:
        """Returns what the summary shows. Raises Stopped when the run was asked to end early."""
        try:
            policy = self._initial_policy()
            config = self.config
            if config.lora:
                torch.manual_seed(config.seed)  # peft draws the adapters' first values
                policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
            learner = Learner(
                policy,
                config.learner,
                config.mtp,
                config.loss,
                temperature=config.rollout.temperature,
                max_completion_tokens=config.rollout.max_completion_tokens,
                reward_weights=self.task.reward_weights,
                schedule=schedule(config.learner.schedule, config.steps, config.learner.warmup_steps),
            )
            prompts = PromptStream(self.task.train, config.seed)
            start = 0
            if self.saved:
                learner.load_state(self.saved.tensors, self.saved.state["learner"])
                prompts.load_state_dict(self.saved.state["prompts"])
                start = self.saved.step
                checkpoint.discard_after(self.checkpoints, start)
            rollout = config.rollout
            pool = open_pool(
                policy,
                rollout.workers,
                dtype=getattr(torch, config.dtype),
                threads=rollout.threads_per_worker,
                prompts_per_shard=rollout.prompts_per_shard,
            )
            try:
                pool.publish(learner.weights(), learner.policy_version)
                return self._steps(learner, prompts, pool, start)
            finally:
                pool.close()
        finally:
            self.task.close()
            self.run_log.close()

    def _initial_policy(self) -> Policy:
        """The policy that GRPO starts from: warm-started now, or by the run that is being resumed."""
        config, folder = self.config, self.output_dir / "warm_start"
        if config.warm_start.steps == 0:
            return load_policy(config, self.task.corpus())
        if not (self.resuming and folder.exists()):
            policy = load_policy(config, self.task.corpus())
            results = warm_start(policy, self.task, config, self.run_log)
            self.run_log.event("warm_start_done", seconds=round(results["seconds"], 1), folder=str(folder))
            policy.save(folder)
        return load_policy(config.model_copy(update={"model": str(folder)}))

    def _steps(self, learner: Learner, prompts: PromptStream, pool: Pool, start: int) -> dict[str, Any]:
        config = self.config
        tokenizer = learner.policy.tokenizer
        sampling = sampling_params(learner.policy, config.rollout, config.rollout.group_size, config.seed)
        heldout = [self.task.prompt(example, tokenizer) for example in self.task.heldout]
        evaluations: dict[str, Evaluation] = {}
        if start == 0 and heldout:
            before = self._evaluate(pool, heldout, sampling, 0)
            evaluations |= {f"before GRPO, {name}": result for name, result in before.items()}
        with self._stop_on_sigterm():
            for step in range(start + 1, config.steps + 1):
                chosen = [self.task.prompt(e, tokenizer) for e in prompts.take(config.prompts_per_step)]
                self._step(step, learner, pool, chosen, sampling.at(step))
                due = step % config.checkpoint.every == 0 or step == config.steps
                stopping = self.terminated or step == self.stop_after
                if self.terminated:
                    self.run_log.event("signal", name="SIGTERM", action="this step is finished and saved")
                if due or stopping:
                    self._save(step, learner, prompts)
                if config.eval.every and step % config.eval.every == 0 and step < config.steps and heldout:
                    self._evaluate(pool, heldout, sampling, step)
                if stopping and step < config.steps:
                    raise Stopped(f"stopped after step {step}; go on with --resume auto")
        summary: dict[str, Any] = {"output_dir": str(self.output_dir), "evaluations": evaluations}
        finished_before = start == config.steps and (self.output_dir / "policy").exists()
        if heldout and not finished_before:
            after = self._evaluate(pool, heldout, sampling, config.steps)
            evaluations |= {f"after GRPO, {name}": result for name, result in after.items()}
        if config.log.measure_speed and heldout and sampling.draft_tokens:
            summary["speeds"] = measure_speed(pool, heldout, sampling, rows=(1, 8, 32))
        learner.policy.save(self.output_dir / "policy")
        return summary

    def _step(self, step: int, learner: Learner, pool: Pool, prompts: list[Prompt], sampling: SamplingParams) -> None:
        """Sample, score, learn, publish: one step of GRPO and its line in the log."""
        run_log, times, version = self.run_log, {}, learner.policy_version
        started = clock = time.perf_counter()
        with run_log.progress() as progress:
            bar = progress.add_task(f"step {step}: sampling", total=len(prompts) * sampling.group_size)
            groups = pool.sample(prompts, sampling, lambda ended: progress.advance(bar, ended))
            clock = times["time/rollout"] = time.perf_counter() - clock
            scores = self.task.score(groups)
            times["time/reward"] = time.perf_counter() - started - clock
            for failure in (failure for score in scores for failure in score.errors):
                run_log.event("reward_error", step=step, **vars(failure))
            batch = learner.prepare(groups, scores)
            run_log.rollouts(step, groups, scores, batch.advantages)
            progress.update(bar, description=f"step {step}: learning", completed=0, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            learned = self._learn(learner, batch, step, advance)
        clock = time.perf_counter()
        if learner.policy_version != version:
            pool.publish(learner.weights(), learner.policy_version)
        times["time/publish"] = time.perf_counter() - clock
        times["time/step"] = time.perf_counter() - started
        metrics = rollout_metrics(groups, scores) | learned | times
        metrics["speed/completion_tokens_per_second"] = metrics["completion/tokens"] / times["time/rollout"]
        metrics["memory/rss_gib"] = psutil.Process().memory_info().rss / 2**30
        if torch.cuda.is_available():
            metrics["memory/device_gib"] = torch.cuda.max_memory_allocated() / 2**30
        run_log.step(step, metrics)

    def _learn(self, learner: Learner, batch: Any, step: int, advance: Any) -> dict[str, float]:
        options = self.config.learner
        try:
            metrics = learner.step(batch, step, advance)
            learner.skipped_in_a_row = 0
            return metrics
        except NonFiniteStep as error:
            learner.skipped_in_a_row += 1
            record = self.output_dir / "rollouts" / f"step_{step:06d}.jsonl.zst"
            self.run_log.event("non_finite", step=step, error=str(error), batch=str(record))
            if options.on_non_finite == "abort" or learner.skipped_in_a_row > options.max_skipped_in_a_row:
                raise NonFiniteStep(
                    f"{error}. This update was not made; the batch is in {record}. Lower learner.learning_rate or "
                    "learner.max_grad_norm, or set learner.on_non_finite: skip, and go on with --resume auto --force"
                ) from None
            return {"learner/updates": 0.0}

    def _evaluate(
        self, pool: Pool, prompts: list[Prompt], sampling: SamplingParams, step: int
    ) -> dict[str, Evaluation]:
        once, batch = replace(sampling, group_size=1), self.config.eval.prompts_per_batch
        with self.run_log.progress() as progress:
            results = evaluate_both_ways(pool, self.task, prompts, once, batch, progress)
        self.run_log.evaluation(step, as_metrics(results))
        return results

    def _save(self, step: int, learner: Learner, prompts: PromptStream) -> None:
        tensors, state = learner.state()
        everything = {"learner": state, "prompts": prompts.state_dict()}
        checkpoint.save(self.checkpoints, step, tensors, everything, keep=self.config.checkpoint.keep)

    @contextmanager
    def _stop_on_sigterm(self) -> Iterator[None]:
        """The first SIGTERM finishes the step and saves; a second one ends the process at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.terminated = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        try:
            previous = signal.signal(signal.SIGTERM, stop)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)


def refuse_changed_config(saved: Path, config: SftConfig) -> None:
    """A resumed run must be the same run. Raises ValueError listing what differs."""
    before = _flat(yaml.safe_load(saved.read_text()))
    now = _flat(yaml.safe_load(dump_yaml(config)))
    decays = config.learner.schedule != "constant"  # over `steps`: other steps are another schedule
    free = tuple(key for key in FREE_TO_CHANGE if not (decays and key == "steps"))
    changed = [
        f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
    if changed:
        raise ValueError(
            "this run was started with another configuration:\n"
            + "\n".join(changed)
            + "\nresume it as it was, or use --force to go on with the new one"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for k, v in tree.items() for key, value in _flat(v, f"{prefix}.{k}" if prefix else k).items()}
