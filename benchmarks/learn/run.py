"""One run of one contender: `python -m benchmarks.learn.run SETTINGS.json OUT.json`. It writes what came of it.

That is the answers to held-out problems at its end, at T = 1 and greedily: the accuracy, or the mean reward where
nothing is right or wrong, and the completions, tokens and seconds that its steps have taken. Those of prompts that were
dropped count too, and the evaluation takes no seconds. A run of the search answers other problems than those that
count.

Each number of steps is a run of its own, whose learning rate falls to nothing at its end: in the middle of a longer
run the rate is high still, and the policy worse than it could be after so many completions.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.learn.tasks import TASKS, Task, config_of, rate_of
from grpo.evaluation.evaluate import both_ways, evaluate_ways
from grpo.session import Session

if TYPE_CHECKING:
    from grpo.algorithm.dynamic_sampling import Drawn
    from rollout.group import Prompt

AT_ONCE = 256  # problems that are answered at once
SAMPLES = 2  # answers of each


class Bench(Session):
    """A session whose evaluations are those of the bench alone."""

    def _evaluates(self, step: int) -> bool:
        return False


def learn(task: Task, name: str, policy: Path, *, seed: int, rate: float, steps: int, counts: bool) -> dict[str, float]:
    """What a run of so many steps has come to; of 0 steps, what its policy is at the start. Where it does not `count`,
    it is one of the search."""
    contender = importlib.import_module(f"benchmarks.learn.contenders.{name}")
    options = {
        **{"model": str(policy), "seed": seed, "steps": max(steps, 1), "sft.steps": 0},
        **{"eval.limit": 2 * task.held_out, "eval.samples": SAMPLES},
        **{"learner.learning_rate": rate * rate_of(task)},
        **contender.OPTIONS,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Bench.open(config_of(task, Path(folder) / "run", **options)) as session,
    ):
        prompts = session.held_out.prompts[: task.held_out] if counts else session.held_out.prompts[task.held_out :]
        assert len(prompts) == task.held_out, f"{task.name} has too few held-out problems: {len(prompts)}"
        spent = {"completions": 0.0, "tokens": 0.0, "seconds": 0.0, "cpu": 0.0}
        for step in session.run.steps() if steps else ():
            clocks = time.perf_counter(), time.process_time()
            drawn = learned(session, contender, step)
            spent["seconds"] += time.perf_counter() - clocks[0]
            spent["cpu"] += time.process_time() - clocks[1]
            completions = [completion for group in drawn.all_groups for completion in group.completions]
            spent["completions"] += len(completions) + drawn.metrics.get("completions", 0.0)
            tokens = sum(len(completion.token_ids) for completion in completions)
            spent["tokens"] += tokens + drawn.metrics.get("tokens", 0.0)
        return spent | answers(session, prompts)


def learned(session: Any, contender: Any, step: int) -> Drawn:
    """Takes a step as the contender draws it, and gives what it drew."""
    drawn = contender.draw(session, step) if hasattr(contender, "draw") else session.draw(step)
    metrics = session.learn(session.prepare(drawn))
    session.sync_weights()
    session.record(step, metrics)
    return drawn


def answers(session: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
    ways = both_ways(replace(session.held_out.sampling, temperature=1.0))
    with session.run.log.progress() as progress:
        results = evaluate_ways(session.held_out.pool, session.task, prompts, ways, AT_ONCE, progress)
    return {way: r.reward_mean if r.accuracy is None else r.accuracy for way, r in results.items()}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    task, name, policy = TASKS[settings["task"]], settings["contender"], Path(settings["policy"])
    options = {option: settings[option] for option in ("seed", "rate", "steps", "counts")}
    Path(sys.argv[2]).write_text(json.dumps(learn(task, name, policy, **options)))


if __name__ == "__main__":
    main()
