"""One run of one contender: `python -m benchmarks.learn.run SETTINGS.json OUT.json`. It writes its curve.

A point of the curve is an evaluation of the held-out problems, at T = 1 and greedily: the accuracy, or the mean reward
where nothing is right or wrong, and the completions, tokens and seconds that the steps before it have taken. Those of
prompts that were dropped count too. Evaluations take no seconds of the curve.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.learn.tasks import TASKS, Task, config_of, rate_of

if TYPE_CHECKING:
    from grpo.algorithm.dynamic_sampling import Drawn


def learn(task: Task, name: str, seed: int, rate: float, policy: Path) -> list[dict[str, float]]:
    """The curve of a run, from before its first step."""
    from grpo.session import Session

    contender = importlib.import_module(f"benchmarks.learn.contenders.{name}")
    options = {
        **{"model": str(policy), "seed": seed, "steps": task.steps, "warm_start.steps": 0},
        **{"eval.limit": task.held_out, "eval.every": task.steps + 1, "learner.learning_rate": rate * rate_of(task)},
        **contender.OPTIONS,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Session.open(config_of(task, Path(folder) / "run", **options)) as session,
    ):
        session.held_out.sampling = replace(session.held_out.sampling, temperature=1.0)
        if hasattr(contender, "listeners"):
            session.collector.listeners += contender.listeners(session)
        spent = {"completions": 0.0, "tokens": 0.0, "seconds": 0.0, "cpu": 0.0}
        curve = [point(session, spent, 0)]
        for step in session.run.steps():
            clocks = time.perf_counter(), time.process_time()
            drawn = learned(session, contender, step)
            spent["seconds"] += time.perf_counter() - clocks[0]
            spent["cpu"] += time.process_time() - clocks[1]
            completions = [completion for group in drawn.all_groups for completion in group.completions]
            candidates, tokens = (drawn.metrics.get(f"curriculum/candidate{name}", 0.0) for name in ("s", "_tokens"))
            spent["completions"] += len(completions) + candidates
            spent["tokens"] += sum(len(completion.token_ids) for completion in completions) + tokens
            if step % task.every == 0:
                curve.append(point(session, spent, step))
    return curve


def learned(session: Any, contender: Any, step: int) -> Drawn:
    """Takes a step as the contender draws it, and gives what it drew."""
    advantages = None
    if hasattr(contender, "draw"):
        drawn, advantages = contender.draw(session, step)
    else:
        drawn = session.draw(step)
    metrics = session.learn(session.prepare(drawn, advantages=advantages))
    session.publish()
    session.record(step, metrics)
    return drawn


def point(session: Any, spent: dict[str, float], step: int) -> dict[str, float]:
    marks = {}
    for way, result in session.evaluate().items():
        marks[way] = result.reward_mean if result.accuracy is None else result.accuracy
    return {"step": step, **spent, **marks}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    task = TASKS[settings["task"]]
    curve = learn(task, settings["contender"], settings["seed"], settings["rate"], Path(settings["policy"]))
    Path(sys.argv[2]).write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
