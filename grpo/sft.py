"""`quartet sft`: the warm start as a run of its own, with an evaluation before and after."""

from __future__ import annotations

from typing import Any

import torch

from grpo.config.options import dump_yaml
from grpo.config.run import SftConfig
from grpo.evaluation.evaluate import Evaluation, evaluate_run
from grpo.learner.parallel import ALONE, Ranks
from grpo.loader import check_options, load_policy, sampling_params
from grpo.policy_source import save_policy
from grpo.run import checkpoint
from grpo.run.lock import RunLock
from grpo.run.log import RunLog
from grpo.run.resume import saved_state
from grpo.run.reward_record import record_rewards
from grpo.run.stop import GivenUp, InterruptiblePool, Stopped, StopSignal
from grpo.run.threads import with_threads
from grpo.task import Task
from grpo.warm_start import warm_start
from policies.policy import Policy
from rollout.pool import open_pool


def sft(
    config: SftConfig,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Returns what the summary shows; the policy is saved to `output_dir/policy`. Raises Stopped, see `Trainer`."""
    check_options(config)
    with RunLock(config.output_dir) as lock:
        return _sft(config, lock, resume, stop_after, force, ranks)


def _sft(
    config: SftConfig, lock: RunLock, resume: str | None, stop_after: int | None, force: bool, ranks: Ranks
) -> dict[str, Any]:
    config = with_threads(config, resume)
    steps, checkpoints = config.warm_start.steps, config.output_dir / "checkpoints"
    saved = saved_state(config, resume=resume, force=force, stop_after=stop_after, steps=steps)
    start = saved.step if saved else 0
    evaluations: dict[str, Evaluation] = {}
    with (
        Task.of(config) as task,
        RunLog(
            config.output_dir,
            dump_yaml(config),
            trackers=config.log.trackers,
            resume_step=None if resume is None else start,
            lock=lock,
            unwritten=saved.state.get("unwritten") if saved else None,
        ) as run_log,
        run_log.until_its_end(),
        StopSignal() as stop,
    ):
        record_rewards(run_log, task.scorer.describe())
        task.record_split(run_log)
        policy = load_policy(config, task.corpus())
        checkpoint.discard_after(checkpoints, start)
        try:
            if start == 0:
                evaluations |= _evaluate("before", policy, task, config, run_log, 0, stop)
            finished_before = start == steps and (config.output_dir / "policy").exists()
            warm_start(
                policy,
                task,
                config,
                run_log,
                checkpoints=checkpoints,
                saved=saved,
                own_run=True,
                stop=stop,
                stop_after=stop_after,
                ranks=ranks,
            )
            start = steps
            if not finished_before:
                evaluations |= _evaluate("after", policy, task, config, run_log, steps, stop)
        except GivenUp:
            said = f"stopped while the policy of step {start} was evaluated; go on with --resume auto"
            raise Stopped(said, stop.number) from None
        save_policy(policy, config.output_dir / "policy", steps)
    return {"output_dir": str(config.output_dir), "evaluations": evaluations}


def _evaluate(
    when: str, policy: Policy, task: Task, config: SftConfig, run_log: RunLog, step: int, stop: StopSignal
) -> dict[str, Evaluation]:
    if not task.heldout:
        return {}
    prompts = [task.prompt(example, policy.tokenizer) for example in task.heldout]
    sampling = sampling_params(policy, config.rollout, 1, config.seed)
    sampler = open_pool(policy, dtype=getattr(torch, config.dtype), prompts_per_shard=config.eval.prompts_per_batch)
    pool = InterruptiblePool(sampler, stop)
    results = evaluate_run(pool, task, prompts, sampling, config.eval, run_log, step)
    return {f"{when}, {name}": result for name, result in results.items()}
