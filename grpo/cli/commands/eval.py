"""`quartet eval`: one policy on one set of held-out problems, sampled and greedy, with everything that is measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.commands.served import is_address, open_served
from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.config.environment import rewards_of
from grpo.data.prompts import shown_columns
from grpo.data.trained_on import trained_on
from grpo.endpoint.agent_sampler import AgentSampler
from grpo.evaluation.evaluate import Evaluation, both_ways, evaluate_ways
from grpo.evaluation.perplexity import Perplexity, gold_perplexity
from grpo.run.console import progress_bars
from grpo.run.memory_errors import phase
from grpo.run.stop import signals
from grpo.source.policy_source import PolicySource, find_policy, known_context
from grpo.task.sampling import agent_of
from grpo.task.task import Task
from policies.devices import peak_gib
from policies.policy import Policy
from rewards.config.data import SourceOptions
from rewards.data.examples import default_held_out_split
from rewards.group_score import GroupScore
from rollout.cost_table import Workload
from rollout.faults import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams
from rollout.workers.kinds import PoolOptions, open_pool

COMPLETIONS = "completions.jsonl"


@dataclass(frozen=True)
class ModelEvaluation:
    """`quartet eval` has measured this. `results` hold `sampled` and `greedy`, or the one that was asked for.
    `trained_on` counts the problems that the policy was trained on; more than 0 only with `allow_trained_on`."""

    config: EvalConfig
    source: PolicySource
    split: str
    problems: int
    trained_on: int
    rewards: list[dict[str, Any]]
    results: dict[str, Evaluation]
    perplexity: Perplexity | None
    peak_memory_gib: dict[str, float]
    no_accuracy: str | None = None  # why there is none

    @property
    def without_any_mark(self) -> bool:
        return all(result.completions == 0 for result in self.results.values())


def refuse_full(folder: Path | None) -> None:
    """Raises FileExistsError if `output` is a folder that holds the completions of an evaluation."""
    if folder and (folder / COMPLETIONS).exists():
        raise FileExistsError(f"output={folder} already holds {COMPLETIONS}; choose another folder, or delete it")


class CompletionsFile:
    """Writes every completion with its mark to `completions.jsonl` in a folder, while the evaluation goes on. `correct`
    is null where the first reward gave no mark, or its marks do not say right or wrong. Raises FileExistsError if the
    file exists."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.path, self.task = folder / COMPLETIONS, task
        refuse_full(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def write(self, way: str, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore]) -> None:
        """Append a line for every completion."""
        task = self.task
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for group, score in zip(groups, scores, strict=True):
                for sample, completion in enumerate(group.completions):
                    line = {
                        "prompt_id": group.prompt.prompt_id,
                        "way": way,
                        "sample": sample,
                        "prompt": group.prompt.text,
                        "completion": completion.text,
                        "answer": task.read_answer(completion.answer),
                        "solution": group.prompt.columns.get(task.solution_column),
                        "correct": task.verdicts.of(score.parts[task.first_reward][sample]),
                        "reward": score.rewards[sample],
                        "parts": {name: values[sample] for name, values in score.parts.items()},
                        "failures": [str(failure) for failure in score.errors if failure.sample_index == sample],
                        "finish_reason": completion.finish_reason,
                        "tokens": completion.num_sampled,
                    }
                    file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        """Set `correct` to null in all lines if a late mark has shown that the reward is no accuracy."""
        if self.task.verdicts.are_given or self.task.verdicts.declared:
            return
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]]
        text = "".join(json.dumps(row | {"correct": None}, ensure_ascii=False) + "\n" for row in rows)
        self.path.write_text(text, encoding="utf-8", errors="backslashreplace")


def evaluate_model(
    config: EvalConfig, console: Console, others: Sequence[str] = (), met: Collection[str] = ()
) -> ModelEvaluation:
    """Evaluate the policy of `config`. What can be checked of model and data is checked before the policy is loaded.
    `others` are evaluated on the same problems later: what one of them was trained on is refused now. So are the
    problems that were `met` otherwise, by their fingerprints."""
    evaluator = _Evaluator(config, others, met)
    with evaluator.open_task() as task:
        return evaluator.run(task, console)


class _Evaluator:
    """Evaluates the policy of `config`, which is loaded here, or that of a server."""

    def __init__(self, config: EvalConfig, others: Sequence[str], met: Collection[str]) -> None:
        self.config = config
        self.served = open_served(config) if is_address(config.model) else None
        self.use = None if self.served else PolicyInUse(config)
        self.agent = agent_of(config)
        self.met = trained_on(self.use.source.folder).union(met) if self.use else frozenset(met)
        self.refused = self.met.union(*(trained_on(find_policy(it).folder) for it in others if not is_address(it)))

    def open_task(self) -> Task:
        """Returns the held-out problems and the rewards."""
        config, context = self.config, None
        if self.use and self.use.source.checkpoint is None:
            context = known_context(self.use.source.folder)
        data, options = SourceOptions(**config.data.model_dump()), config.eval
        if " + " in data.name and not Path(data.name).exists():
            raise ValueError(
                f"data.name={data.name}: the run has several sources of data, which are evaluated one by one; give the "
                "name of one of them, as in data of its config.yaml (--data.name gsm8k)"
            )
        if data.held_out and self.use:
            self._refuse_other_columns(data)
        self.split = options.split or (data.split if data.held_out else default_held_out_split(data.name))
        return Task(
            data,
            rewards_of(config),
            config.reward,
            seed=config.seed,
            train=False,
            held_out=options.limit,
            held_out_split=self.split,
            device=config.device,
            met=frozenset() if config.allow_trained_on else self.refused,
            contexts={data.prompt_column: context} if context else None,
            environment=self.use.environment if self.use else None,
            agent=self.agent,
        )

    def _refuse_other_columns(self, data: SourceOptions) -> None:
        """Raises ValueError where a share of the run's data would be held out by other columns than in the run."""
        of_run = defaults_of_run(Path(self.config.model)).get("data", {})
        if of_run.get("name") != data.name:
            return
        then = shown_columns(of_run["template"])
        now = shown_columns(data.template)
        if then != now:
            raise ValueError(
                f"data.template={data.template!r} shows the columns {now}, and the run's template {then}: "
                "data.held_out chooses problems by what is shown, so others would be evaluated, on which the policy "
                "was trained; show the same columns, or name a split (eval.split) and set data.held_out to null"
            )

    def run(self, task: Task, console: Console) -> ModelEvaluation:
        """Sample in every way, score, and measure."""
        config = self.config
        completions = CompletionsFile(config.output, task) if config.output else None
        policy, sampler, prompts, sampling = self._open(task)
        asked = {"sampled": config.eval.samples > 0, "greedy": config.eval.greedy}
        ways = {way: params for way, params in both_ways(sampling).items() if asked[way]}
        write = completions.write if completions else None
        try:
            with phase("evaluating", config), progress_bars(console, enabled=True) as progress:
                results = evaluate_ways(sampler, task, prompts, ways, config.rollout.prompts_per_shard, progress, write)
        except RolloutError as error:
            if completions is None or not error.groups:
                raise
            raise RolloutError(f"{error}\nthe other completions are in {completions.path}", error.groups) from None
        finally:
            if completions:
                completions.close()
            if isinstance(sampler, AgentSampler):
                sampler.close()
        return ModelEvaluation(
            config=config,
            source=self.use.source if self.use else sampler.source,
            split=self.split,
            problems=len(prompts),
            trained_on=sum(fingerprint in self.met for fingerprint in task.fingerprints(task.held_out)),
            rewards=task.scorer.describe(),
            results=results,
            perplexity=policy and _perplexity(policy, task),
            peak_memory_gib=peak_memory_gib(),
            no_accuracy=task.verdicts.note,
        )

    def _open(self, task: Task) -> tuple[Policy | None, Any, list[Prompt], SamplingParams]:
        """Returns the policy that is loaded here, what samples, the prompts, and how the policy answers."""
        config, rollout, size = self.config, self.config.rollout, max(self.config.eval.samples, 1)
        if self.served:
            limit, stops = rollout.max_completion_tokens, config.stop_strings
            sampling = SamplingParams(size, rollout.temperature, limit, seed=config.seed, stop_strings=stops)
            return None, self.served, [self.served.prompt(it, task.template) for it in task.held_out], sampling
        assert self.use is not None
        policy = self.use.load()
        task.check_lengths(policy, rollout.max_completion_tokens)
        prompts = [task.prompt(example, policy.tokenizer) for example in task.held_out]
        sampling, batch = self.use.sampling(policy, size, config.seed, config.stop_strings), rollout.prompts_per_shard
        with self.use.phase("loading"):
            dtype = getattr(torch, config.dtype)
            pool = open_pool(policy, PoolOptions(dtype=dtype, prompts_per_shard=batch, check_stop=signals.check))
        if sampling.draft_tokens is None and policy.mtp is not None:
            pool.use_costs(None, Workload.of(sampling, batch * sampling.group_size))  # else measured on the clock
        sampler = AgentSampler(pool, self.agent, rollout.temperature) if self.agent else pool
        return policy, sampler, prompts, sampling


def _perplexity(policy: Policy, task: Task) -> Perplexity | None:
    stop = policy.stop_token_ids[0]
    return gold_perplexity(policy, [task.solution(e, policy.tokenizer, stop) for e in task.held_out if e.solution])


def peak_memory_gib() -> dict[str, float]:
    """Returns the most memory that this process has held (without its reward workers), and the most on the device."""
    if sys.platform == "win32":
        most = psutil.Process().memory_info().peak_wset
    else:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # or KiB
    return {"rss": most / 2**30} | peak_gib()
