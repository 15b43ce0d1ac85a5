"""One run of one contender: `python -m benchmarks.learn.run SETTINGS.json OUT.json`. It writes its curve.

A point of the curve is an evaluation of the held-out problems at T = 1: the completions, tokens and seconds that the
steps before it have taken, all of them counted, those of prompts that were dropped too, and the accuracy, or the mean
reward where nothing is right or wrong. Evaluations take no seconds of the curve.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.learn.tasks import QUIET, ROOT, TASKS, Task


def options_of(task: Task, contender: Any, seed: int, rate: float, folder: Path, policy: Path) -> dict[str, Any]:
    """The options of a run over those of the task's configuration."""
    return {
        **QUIET,
        **task.changes,
        "model": str(policy),
        "output_dir": str(folder),
        "seed": seed,
        "steps": task.steps,
        "warm_start.steps": 0,
        "eval.limit": task.held_out,
        "eval.every": task.every,
        "learner.learning_rate": rate,
        **contender.OPTIONS,
    }


def learn(task: Task, name: str, seed: int, rate: float, policy: Path) -> list[dict[str, float]]:
    """The curve of a run, from before its first step."""
    from grpo.config.run import TrainConfig
    from grpo.session import Session

    contender = importlib.import_module(f"benchmarks.learn.contenders.{name}")
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(task, contender, seed, rate, Path(folder) / "run", policy)
        config = TrainConfig.read(ROOT / "examples" / task.config, **options)
        with Session.open(config) as session:
            session.held_out.sampling = replace(session.held_out.sampling, temperature=1.0)
            spent = {"completions": 0.0, "tokens": 0.0, "seconds": 0.0, "cpu": 0.0}
            curve = [point(session, spent, 0)]
            for step in session.run.steps():
                clocks = time.perf_counter(), time.process_time()
                drawn = session.draw(step)
                batch = session.prepare(drawn)
                metrics = session.learn(batch)
                session.publish()
                session.record(step, metrics)
                spent["seconds"] += time.perf_counter() - clocks[0]
                spent["cpu"] += time.process_time() - clocks[1]
                completions = [completion for group in drawn.all_groups for completion in group.completions]
                spent["completions"] += len(completions)
                spent["tokens"] += sum(len(completion.token_ids) for completion in completions)
                if step % task.every == 0:
                    curve.append(point(session, spent, step))
    return curve


def point(session: Any, spent: dict[str, float], step: int) -> dict[str, float]:
    results = session.evaluate()
    sampled, greedy = (next(r for way, r in results.items() if name in way) for name in ("sampled", "greedy"))
    marks = {"sampled": sampled, "greedy": greedy}
    found = {way: r.reward_mean if r.accuracy is None else r.accuracy for way, r in marks.items()}
    return {"step": step, **spent, **found}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    task = TASKS[settings["task"]]
    curve = learn(task, settings["contender"], settings["seed"], settings["rate"], Path(settings["policy"]))
    Path(sys.argv[2]).write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
