"""The warm start: supervised steps on prompts and gold solutions, the MTP head trained beside the trunk."""

from __future__ import annotations

import time

from grpo.config import SftConfig
from grpo.learner import Learner
from grpo.optimizer import schedule
from grpo.prompts import PromptStream
from grpo.run_log import RunLog
from grpo.task import Task
from policies.policy import Policy


def warm_start(policy: Policy, task: Task, config: SftConfig, run_log: RunLog) -> dict[str, float]:
    """Train `policy` in place for `warm_start.steps`; returns the last step's metrics and the seconds it took.

    Adapters are not used here even where GRPO will: LoRA starts from the warm policy.
    """
    options = config.warm_start
    learner = Learner(
        policy,
        config.learner,
        config.mtp.model_copy(update={"every": 1, "share": 1.0}),  # little data: the head sees all of it
        learning_rate=options.learning_rate,
        schedule=schedule(options.schedule, options.steps, options.warmup_steps),
    )
    stream = PromptStream(task.train_for(options.levels), config.seed)
    stop, raw = policy.stop_token_ids[0], not options.strip_calculator_marks
    metrics: dict[str, float] = {}
    started = time.perf_counter()
    with run_log.progress() as progress:
        bar = progress.add_task("warm start", total=options.steps)
        for step in range(1, options.steps + 1):
            examples = stream.take(options.batch_size)
            rows = [task.solution(example, policy.tokenizer, stop, raw) for example in examples]
            metrics = learner.sft_step(rows, step)
            progress.update(bar, advance=1, description=f"warm start, loss {metrics['loss/sft']:.3f}")
            if step % 50 == 0 or step == options.steps:
                shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("loss/sft", "loss/mtp") if name in metrics)
                run_log.say(f"warm start {step:4d}/{options.steps}  {shown}")
    return metrics | {"seconds": time.perf_counter() - started}
