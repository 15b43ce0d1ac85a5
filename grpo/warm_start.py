"""The warm start: supervised steps on prompts and gold solutions, the MTP head trained beside the trunk."""

from __future__ import annotations

import time
from functools import partial
from math import nan
from pathlib import Path

from grpo.config.run import SftConfig
from grpo.data.prompts import PromptStream
from grpo.learner.learner import Learner
from grpo.learner.optimizer import schedule
from grpo.learner.parallel import ALONE, Ranks
from grpo.non_finite import take_step
from grpo.run import checkpoint
from grpo.run.checkpoint import Checkpoint
from grpo.run.log import RunLog
from grpo.run.stop import Boundary, StopSignal
from grpo.task import Task
from policies.policy import Policy


def sft_learner(policy: Policy, config: SftConfig, ranks: Ranks = ALONE) -> Learner:
    """Adapters are not used here even where GRPO will: LoRA starts from the warm policy."""
    options = config.warm_start
    return Learner(
        policy,
        config.learner,
        config.mtp,
        balance=config.balance,
        learning_rate=options.learning_rate,
        schedule=schedule(options.schedule, options.steps, options.warmup_steps),
        ranks=ranks,
    )


def warm_start(
    policy: Policy,
    task: Task,
    config: SftConfig,
    run_log: RunLog,
    *,
    checkpoints: Path | None = None,
    saved: Checkpoint | None = None,
    own_run: bool = False,
    stop: StopSignal | None = None,
    stop_after: int | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train `policy` in place for `warm_start.steps`; returns the last step's metrics and the seconds it took.

    Goes on from `saved`. Saves into `checkpoints`, if given, every `checkpoint.every` steps, when it fails, and when it
    is stopped, which a signal and `stop_after` do after a step. Raises Stopped then. `own_run`: its steps are those of
    the run, so that their metrics are recorded and the last one is saved too.
    """
    options = config.warm_start
    ranks.begin("sft", policy)
    learner = sft_learner(policy, config, ranks)
    stream = PromptStream(task.train_for(options.levels), config.seed)
    start = 0
    if saved:
        learner.load_state(saved.tensors, saved.state["learner"])
        stream.load_state_dict(saved.state["prompts"])
        start = saved.step
    ranks.hand_over(learner)
    token, raw = policy.stop_token_ids[0], not options.strip_calculator_marks
    metrics: dict[str, float] = {}
    started = time.perf_counter()

    def save(step: int) -> None:
        if checkpoints:
            tensors, state = learner.state()
            everything = {"learner": state, "prompts": stream.state_dict(), **run_log.state()}
            checkpoint.save(checkpoints, step, tensors, everything, keep=config.checkpoint.keep)

    stop = stop or StopSignal()
    boundary = Boundary(start, save, run_log, stop, " of the warm start")
    with boundary, run_log.progress() as progress:
        bar = progress.add_task("warm start", total=options.steps, completed=start)
        for step in range(start + 1, options.steps + 1):
            before = stream.state_dict()
            examples = stream.take(options.batch_size)
            rows = [task.solution(example, policy.tokenizer, token, raw) for example in examples]
            try:
                metrics = take_step(
                    learner,
                    step,
                    partial(ranks.call, learner, "sft_step", rows, step),
                    run_log,
                    batch=run_log.output_dir / "events.jsonl",
                    rate="warm_start.learning_rate",
                    examples=[example.example_id for example in examples],
                )
            except BaseException:
                stream.load_state_dict(before)
                raise
            boundary.reached(step)
            if own_run:
                run_log.step(step, metrics, show=False)
            loss = metrics.get("loss/sft", nan)
            progress.update(bar, advance=1, description=f"warm start, loss {loss:.3f}")
            if step % 50 == 0 or step == options.steps:
                shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("loss/sft", "loss/mtp") if name in metrics)
                run_log.say(f"warm start {step:4d}/{options.steps}  {shown}")
            last = step == options.steps
            stopping = not last and (step == stop_after or stop.asked)
            if stopping or (own_run if last else step % config.checkpoint.every == 0):
                boundary.save()
            if stopping:
                raise boundary.stopped()
    return metrics | {"seconds": time.perf_counter() - started}
