"""Supervised fine-tuning on prompts and gold solutions, the MTP head trained beside the trunk.

`quartet sft` is a run of it with an evaluation before and after; the warm start is the same inside a run of GRPO.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

from grpo.config.run import SftConfig
from grpo.evaluation.evaluate import Evaluation
from grpo.evaluation.held_out import HeldOut, Result
from grpo.source.policy_source import save_policy
from grpo.steps.loop import Run
from grpo.steps.opening import first_policy, open_run
from grpo.steps.pool import open_run_pool, sampling_of
from grpo.steps.supervise import supervise
from grpo.task.task import Task
from policies.policy import Policy


def sft(
    config: SftConfig,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
) -> Result:
    """The policy is saved to `output_dir/policy`. Raises Stopped when the run was asked to end early."""
    flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
    with open_run(config, config.steps, **flags) as (run, task):
        policy = first_policy(run, task)
        results: dict[str, Evaluation] = {}
        if run.step == 0:
            results |= _evaluate("before", run, task, policy)
        supervise(policy, task, run)
        if not run.ended_before:
            results |= _evaluate("after", run, task, policy)
        save_policy(policy, run.folder / "policy", run.step)
    return Result(run.folder, policy, results)


def _evaluate(when: str, run: Run[SftConfig], task: Task, policy: Policy) -> dict[str, Evaluation]:
    if not task.held_out:
        return {}
    options = run.config.eval
    sampling = replace(sampling_of(run, policy, options.samples), environment=task.actor.environment)
    with closing(open_run_pool(run, policy, prompts_per_shard=64)) as pool:
        held_out = HeldOut(task, policy, pool, run.log, sampling)
        run.alone(held_out.evaluate, run.step, when)
    return held_out.results
