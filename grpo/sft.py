"""`quartet sft`: the warm start as a run of its own, with an evaluation before and after."""

from __future__ import annotations

from typing import Any

from grpo.config import SftConfig
from grpo.evaluate import Evaluation, as_metrics, evaluate_both_ways
from grpo.loader import load_policy, sampling_params
from grpo.options import dump_yaml
from grpo.run_log import RunLog
from grpo.task import Task
from grpo.warm_start import warm_start
from policies.policy import Policy
from rollout.pool import open_pool


def sft(config: SftConfig) -> dict[str, Any]:
    """Returns what the summary shows. The policy is saved to `output_dir/policy`."""
    with (
        Task.of(config) as task,
        RunLog(config.output_dir, dump_yaml(config), trackers=config.log.trackers) as run_log,
    ):
        policy = load_policy(config, task.corpus())
        evaluations = _evaluate("before", policy, task, config, run_log, 0)
        warm_start(policy, task, config, run_log)
        policy.save(config.output_dir / "policy")
        evaluations |= _evaluate("after", policy, task, config, run_log, config.warm_start.steps)
    return {"output_dir": str(config.output_dir), "evaluations": evaluations}


def _evaluate(
    when: str, policy: Policy, task: Task, config: SftConfig, run_log: RunLog, step: int
) -> dict[str, Evaluation]:
    if not task.heldout:
        return {}
    prompts = [task.prompt(example, policy.tokenizer) for example in task.heldout]
    sampling = sampling_params(policy, config.rollout, 1, config.seed)
    pool = open_pool(policy, prompts_per_shard=config.eval.prompts_per_batch)
    with run_log.progress() as progress:
        results = evaluate_both_ways(pool, task, prompts, sampling, config.eval.prompts_per_batch, progress)
    run_log.evaluation(step, as_metrics(results))
    return {f"{when}, {name}": result for name, result in results.items()}
