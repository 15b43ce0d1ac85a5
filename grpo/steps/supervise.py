"""Supervised steps on prompts and gold solutions: those of `quartet sft`, and the warm start of a run of GRPO."""

from __future__ import annotations

import shutil
import time
from functools import partial
from math import nan

from grpo.config.run import SftConfig, TrainConfig
from grpo.data.prompts import PromptStream
from grpo.learner.build import sft_learner
from grpo.learner.optimizer import ramp
from grpo.learner.prepare import supervised
from grpo.source.policy_source import load_policy
from grpo.steps.loop import Run
from grpo.task.task import Task
from policies.files.digests import write_digests
from policies.policy import Policy


def supervise(policy: Policy, task: Task, run: Run[SftConfig] | Run[TrainConfig]) -> None:
    """Train `policy` in place for the steps of `run`; the last step's metrics are left in `run.metrics`."""
    config, options = run.config, run.config.warm_start
    learner = sft_learner(policy, config, run.ranks)
    prompts = PromptStream(task.train_for(options.levels), config.seed)
    run.restore(learner=learner, prompts=prompts)
    token, raw, deepest = policy.stop_token_ids[0], not options.strip_calculator_marks, config.mtp.depth
    with run, run.log.progress() as progress:
        bar = progress.add_task("warm start", total=run.last, completed=run.start)
        for step in run.steps():
            examples = prompts.take(options.batch_size)
            rows = [task.solution(example, policy.tokenizer, token, raw) for example in examples]
            depth = round(ramp(step, options.steps, options.draft_depth or deepest, deepest))
            run.learn(
                partial(learner.step, supervised(rows, step, depth)),
                rate="warm_start.learning_rate",
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


def warm_start(run: Run[TrainConfig], task: Task) -> None:
    """Supervised steps into `warm_start/`, unless the run that is being resumed has made them."""
    config, folder, steps = run.config, run.folder / "warm_start", "warm_start_checkpoints"
    if config.warm_start.steps and not (run.resumes and folder.exists()):
        if not run.resumes:
            run.alone(shutil.rmtree, run.folder / steps, ignore_errors=True)
        started = time.perf_counter()
        policy = load_policy(config, task.corpus(), run.ranks)
        task.check_lengths(policy, config.rollout.max_completion_tokens)
        supervise(policy, task, run.part(steps, config.warm_start.steps, " of the warm start"))
        seconds = round(time.perf_counter() - started, 1)
        run.log.event("warm_start_done", seconds=seconds, folder=str(folder))
        policy.save(folder)
        run.alone(write_digests, folder)
    if config.warm_start.steps:
        run.alone(shutil.rmtree, run.folder / steps, ignore_errors=True)
