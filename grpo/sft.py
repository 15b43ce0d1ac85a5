"""Supervised fine-tuning on prompts and gold solutions, the MTP head trained beside the trunk.

`quartet sft` is a run of it with an evaluation before and after; the warm start is the same inside a run of GRPO.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial
from math import nan
from typing import Any

from grpo.checks.run import check_plan, open_task
from grpo.config.problems import python_words
from grpo.config.run import SftConfig, TrainConfig
from grpo.data.curriculum import ramp
from grpo.data.prompts import PromptStream
from grpo.evaluation.evaluate import Evaluation
from grpo.evaluation.held_out import HeldOut, Result
from grpo.learner.build import sft_learner
from grpo.learner.parallel import ALONE, Ranks
from grpo.source.policy_source import in_4_bits, load_policy, save_policy, with_threads
from grpo.steps.loop import Run
from grpo.steps.pool import open_run_pool
from grpo.task.sampling import environment_of, sampling_params
from grpo.task.task import Task
from policies import four_bit
from policies.files.digests import write_digests
from policies.policy import Policy


@python_words()
def sft(
    config: SftConfig,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> Result:
    """The policy is saved to `output_dir/policy`. Raises Stopped when the run was asked to end early."""
    config = with_threads(config, resume, check_plan(config).shape)
    steps = config.warm_start.steps
    flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
    with (
        open_task(config, scores=ranks.first) as task,
        Run.open(config, steps, task.describe_rewards(), ranks=ranks, **flags) as run,
    ):
        task.record_split(run.log)
        policy = load_policy(config, task.corpus(), ranks)
        if task.heldout:
            task.check_lengths(policy, config.rollout.max_completion_tokens)
        results: dict[str, Evaluation] = {}
        if run.step == 0:
            results |= _evaluate("before", run, task, policy)
        supervise(policy, task, run)
        if not run.ended_before:
            results |= _evaluate("after", run, task, policy)
        save_policy(policy, run.folder / "policy", run.step)
    return Result(run.folder, policy, results)


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
            learner.set_draft_depth(round(ramp(step, options.steps, options.draft_depth or deepest, deepest)))
            run.learn(
                partial(learner.sft_step, rows, step),
                rate="warm_start.learning_rate",
                batch=run.folder / "events.jsonl",
                examples=[example.example_id for example in examples],
            )
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


def first_policy(run: Run[TrainConfig], task: Task) -> Policy:
    """The policy that GRPO starts from."""
    config = run.config
    if config.warm_start.steps:
        config = config.model_copy(update={"model": str(run.folder / "warm_start")})
    policy = load_policy(config, task.corpus(), run.ranks)
    if in_4_bits(config):
        run.log.event("base_in_4_bits", **four_bit.counts(policy.trunk))
    task.check_lengths(policy, config.rollout.max_completion_tokens)
    return policy


def _evaluate(when: str, run: Run[SftConfig], task: Task, policy: Policy) -> dict[str, Evaluation]:
    config, options = run.config, run.config.eval
    if not task.heldout:
        return {}
    own = {"workers": 0, "backend": None, "prompts_per_shard": options.prompts_per_batch}
    rollout = config.rollout.model_copy(update=own)
    pool = open_run_pool(policy, rollout, config.dtype, run.log, samples=run.ranks.first)
    sampling = sampling_params(policy, config.rollout, options.samples, config.seed)
    sampling = replace(sampling, environment=environment_of(config))
    held_out = HeldOut(task, policy, pool, run.log, options, sampling)
    run.alone(held_out.evaluate, run.step, when)
    return held_out.results
