"""Supervised steps on prompts and gold solutions: the learner of `quartet sft`, and the SFT stage of a run of GRPO."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo.config.learner import LearnerOptions
from grpo.config.run import TrainConfig
from grpo.learner.build import terms_of
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Likelihood
from grpo.learner.optimizer import schedule
from grpo.learner.terms.supervised import SupervisedTerm
from grpo.steps.collector import Collector
from grpo.steps.loop import Run
from grpo.steps.opening import LearningSession, Session, first_policy
from grpo.steps.pool import sampling_of
from grpo.task.task import Task
from policies.files.checksums import write_checksums
from policies.policy import Policy

if TYPE_CHECKING:
    from rollout.group import Prompt


class Best(Protocol):
    """The best point of supervised steps by the validation problems: a `grpo.evaluation.best_point.BestPoint`."""

    folder: Path
    prompts: list[Prompt]
    step: int
    value: float | None

    def look(self, step: int) -> float | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def supervised_learner(run: Run[Any], policy: Policy) -> Learner:
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


def supervised_session(
    session_of: Callable[..., Session], run: Run[Any], task: Task, policy: Policy | None = None
) -> Session:
    """A session of `grpo.session` that learns from gold solutions."""
    config, policy = run.config, policy or first_policy(run, task)
    stream = task.stream(config.seed, task.solved)
    sampling = replace(sampling_of(run, policy, config.eval.samples), environment=task.actor.environment)
    session = session_of(run, task, supervised_learner(run, policy), Collector(run, task, policy, sampling, stream))
    run.restore(learner=session.learner, prompts=stream)
    return session


def run_sft_stage(
    run: Run[TrainConfig], task: Task, session_of: Callable[..., LearningSession], best_of: Callable[..., Best]
) -> None:
    """Supervised steps into `warm_start/`, unless the run that is being resumed has made them.

    `best_of(session, folder)` keeps the best point by the validation problems (grpo/evaluation/best_point.py)."""
    folder, steps = run.folder / "warm_start", run.folder / "warm_start_checkpoints"
    if not (run.resumes and folder.exists()):
        if not run.resumes:
            run.on_first_rank(shutil.rmtree, steps, ignore_errors=True)
        started = time.perf_counter()
        part = run.part(steps.name, run.config.sft.steps, " of the SFT stage")
        session = supervised_session(session_of, part, task)
        best = best_of(session, run.folder / "warm_start_best")
        part.restore(learner=session.learner, prompts=session.collector.stream, best=best)
        supervise(session, best)
        seconds = round(time.perf_counter() - started, 1)
        chosen: dict[str, Any] = {"step": best.step, "accuracy": best.value} if best.prompts else {}
        run.log.event("warm_start_done", seconds=seconds, **chosen, folder=str(folder))
        if best.prompts:
            run.on_first_rank(best.folder.rename, folder)
        else:
            session.policy.save(folder)
        run.on_first_rank(write_checksums, folder)
    run.on_first_rank(shutil.rmtree, steps, ignore_errors=True)


def supervise(session: LearningSession, best: Best) -> None:
    """The loop of `quartet sft` on a part of a run, with a look at the validation problems."""
    run, size = session.run, session.run.config.supervision.batch_size
    with run, run.log.progress() as progress:
        bar = progress.add_task("SFT stage", total=run.last, completed=run.start)
        for step in run.steps():
            batch = session.prepare_solutions(session.solutions(size))
            metrics = session.learn(batch)
            best.look(step)
            session.record(step, metrics)
            session.save_if_due(step)
            progress.update(bar, advance=1, description=f"SFT stage, loss {metrics.get('loss/sft', nan):.3f}")
