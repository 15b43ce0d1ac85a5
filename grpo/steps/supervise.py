"""Supervised steps on prompts and gold solutions: those of `quartet sft`, and the warm start of a run of GRPO."""

from __future__ import annotations

import shutil
import time
from functools import partial
from math import nan
from typing import Any

from grpo.config.learner import LearnerOptions
from grpo.config.run import SftConfig, TrainConfig
from grpo.data.prompts import PromptStream
from grpo.learner.build import terms_of
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.optimizer import schedule
from grpo.learner.prepare import supervised
from grpo.learner.terms.supervised import SupervisedTerm
from grpo.steps.loop import Run
from grpo.steps.opening import first_policy
from grpo.task.task import Task
from policies.files.digests import write_digests
from policies.policy import Policy


def supervise(policy: Policy, task: Task, run: Run[Any]) -> None:
    """Train `policy` in place for the steps of `run`; the last step's metrics are left in `run.metrics`."""
    config, options, learner = run.config, run.config.supervision, learner_of(run, policy)
    prompts = PromptStream(task.train, config.seed)
    run.restore(learner=learner, prompts=prompts)
    token = policy.stop_token_ids[0]
    with run, run.log.progress() as progress:
        bar = progress.add_task("warm start", total=run.last, completed=run.start)
        for step in run.steps():
            examples = prompts.take(options.batch_size)
            rows = [task.solution(example, policy.tokenizer, token) for example in examples]
            run.learn(
                partial(learner.step, supervised(rows, step)),
                rate=f"{'learner' if isinstance(config, SftConfig) else 'warm_start'}.learning_rate",
                batch=run.folder / "events.jsonl",
                examples=[example.example_id for example in examples],
            )
            run.reached()
            run.record(show=False)
            progress.update(bar, advance=1, description=f"warm start, loss {run.metrics.get('loss/sft', nan):.3f}")
            if step % max(1, min(50, run.last // 10)) == 0 or step == run.last:
                names = [name for name in ("loss/sft", "loss/mtp", "loss/mtp_tv") if name in run.metrics]
                shown = "  ".join(f"{name} {run.metrics[name]:.3f}" for name in names)
                run.log.say(f"warm start {step:4d}/{run.last}  {shown}")
            run.save_if_due()


def learner_of(run: Run[Any], policy: Policy) -> Learner:
    """Adapters are not used here even where GRPO will: LoRA starts from the warm policy."""
    config, options = run.config, run.config.supervision
    of_solutions = {"updates_per_batch": 1, "learning_rate": options.learning_rate}  # the others are of rollouts
    with run.phase("loading"):
        terms = [SupervisedTerm(), *terms_of(policy, config)]
        return Learner(
            policy,
            LearnerOptions(**config.learner.model_dump() | of_solutions),
            terms,
            Likelihood(policy, watchers=terms),
            schedule=schedule(options.schedule, options.steps, options.warmup_steps),
            ranks=run.ranks,
        )


def warm_start(run: Run[TrainConfig], task: Task) -> None:
    """Supervised steps into `warm_start/`, unless the run that is being resumed has made them."""
    folder, steps = run.folder / "warm_start", "warm_start_checkpoints"
    if not (run.resumes and folder.exists()):
        if not run.resumes:
            run.alone(shutil.rmtree, run.folder / steps, ignore_errors=True)
        started = time.perf_counter()
        policy = first_policy(run, task)
        supervise(policy, task, run.part(steps, run.config.warm_start.steps, " of the warm start"))
        seconds = round(time.perf_counter() - started, 1)
        run.log.event("warm_start_done", seconds=seconds, folder=str(folder))
        policy.save(folder)
        run.alone(write_digests, folder)
    run.alone(shutil.rmtree, run.folder / steps, ignore_errors=True)
