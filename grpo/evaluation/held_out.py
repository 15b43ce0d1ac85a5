"""The held-out problems of a run: evaluated before training, every so often, and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from grpo.evaluation.evaluate import Evaluation, as_metrics, both_ways, evaluate_ways, source_metrics
from grpo.run.log import RunLog
from grpo.run.memory_errors import phase
from grpo.task.task import Task
from policies.policy import Policy
from review.readers.run_folder import read_metrics
from rewards.group_score import RewardFailed
from rewards.verdicts import ACCURACY, MEAN_REWARD
from rollout.group import Prompt
from rollout.pool import Sampler
from rollout.sampling import SamplingParams

if TYPE_CHECKING:
    from review.page.report import Report


AT_ONCE = 256  # problems that the pool gets at once, of which it makes shards


class HeldOut:
    """Samples every held-out problem as `sampling` says and greedily, with the same noise each time.

    `results` are the evaluations so far that have a name, such as "before GRPO, sampled". `heed` is called with the
    step and its evaluations by way of sampling. They are due before the first step, and after `every` so many.
    """

    every: int | None = None

    def __init__(
        self,
        task: Task,
        policy: Policy,
        pool: Sampler,
        log: RunLog,
        sampling: SamplingParams,
        heed: Callable[[int, Mapping[str, Evaluation]], None] = lambda step, results: None,
    ) -> None:
        self.task, self.pool, self.log, self.sampling, self.heed = task, pool, log, sampling, heed
        self.tokenizer = policy.tokenizer
        self.prompts = [task.prompt(example, policy.tokenizer) for example in task.held_out]
        self.results: dict[str, Evaluation] = {}

    def due(self, step: int, last: int) -> bool:
        """Before the first step and every `every` steps; the evaluation after the last step is not meant."""
        return bool(self.prompts) and step < last and (step == 0 or bool(self.every and step % self.every == 0))

    def done(self, step: int) -> bool:
        """Tells whether this step's evaluation is recorded. A run that was cut off before it still has to make it."""
        return any(line["step"] == step and "eval/prompts" in line for line in read_metrics(self.log.output_dir))

    def evaluate(self, step: int, when: str | None = None) -> dict[str, Evaluation]:
        """Evaluates the held-out problems; with `when` the results have names of their own.

        They become metrics of the run, and each failed reward an event.
        """
        if not self.prompts:
            return {}
        try:
            results = self.answer(self.prompts, step)
        except RewardFailed as error:
            self.log.event("reward_error", step=step, evaluation="given up", **vars(error.failure))
            raise
        for way, result in results.items():
            for failure in result.failures:
                self.log.event("reward_error", step=step, evaluation=way, **vars(failure))
        self.log.evaluation(step, as_metrics(results) | source_metrics(self.task, results["sampled"]))
        if when:
            self._keep_problems(step, results["sampled"])
        self.heed(step, results)
        named = {f"{when}, {way}" if when else way: result for way, result in results.items()}
        self.results |= named if when else {}
        return named

    def answer(self, prompts: Sequence[Prompt], step: int) -> dict[str, Evaluation]:
        """Evaluates these prompts, by way of sampling and greedily. It is recorded nowhere."""
        if not prompts:
            return {}
        self.task.reached(step)
        ways, options = both_ways(self.sampling), SimpleNamespace(samples=self.sampling.group_size)
        with (
            phase("evaluating", SimpleNamespace(eval=options, rollout=self.sampling)),
            self.log.progress() as progress,
        ):
            return evaluate_ways(self.pool, self.task, prompts, ways, AT_ONCE, progress)

    def _keep_problems(self, step: int, result: Evaluation) -> None:
        metric = MEAN_REWARD if result.accuracy is None else ACCURACY
        ids = [group.prompt.prompt_id for group in result.groups]
        self.log.problems(step, metric, dict(zip(ids, result.by_problem, strict=True)))


@dataclass(frozen=True, repr=False)
class Result:
    """What a training has made: its folder, the policy at its end, and its evaluations by name.

    >>> result
    Result('runs/demo': before GRPO, greedy: accuracy 0.670; after GRPO, greedy: accuracy 0.777)
    >>> result.evaluations["after GRPO, sampled"].accuracy
    0.734375
    """

    folder: Path
    policy: Policy
    evaluations: dict[str, Evaluation]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step: see `read_metrics`."""
        return read_metrics(self.folder)

    def plot(self) -> Report:
        """Writes the page of the run, with its curves, as `report.html` into its folder. A notebook shows what is
        returned. Raises ValueError without the extra `view`."""
        from review.page.report import Report, report  # a training loads no page

        return Report(report(self.folder, self.folder / "report.html"))

    def __repr__(self) -> str:
        """The folder, and what greedy decoding got; where nothing was decoded greedily, what sampling got."""
        greedy = {name: result for name, result in self.evaluations.items() if "greedy" in name}
        lines = [f"{name}: {_mark(result)}" for name, result in (greedy or self.evaluations).items()]
        return f"Result({str(self.folder)!r}: {'; '.join(lines) or 'nothing was evaluated'})"


def _mark(evaluation: Evaluation) -> str:
    if evaluation.accuracy is not None:
        return f"accuracy {evaluation.accuracy:.3f}"
    return "no score" if evaluation.reward_mean is None else f"mean reward {evaluation.reward_mean:.3f}"
