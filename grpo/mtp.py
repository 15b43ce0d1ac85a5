"""`quartet mtp`: a policy teaches its own draft head.

Each of the first steps, in the order of the code below:
1. samples groups from the policy,
2. reads them once with the frozen trunk, and keeps what the head can learn from on disk.

Each of the others is an epoch over all of that, which
3. teaches the head the trunk's distributions at every depth,
4. measures on the rollouts of other prompts which drafts the trunk would have taken, and is undone if they are no more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo.config.mtp import MtpConfig
from grpo.data.examples import Example
from grpo.data.prompts import PromptStream
from grpo.evaluation.held_out import HeldOut, Result
from grpo.learner.batch import PackedRow, Sample, split_rows
from grpo.learner.head_learner import HeadLearner
from grpo.learner.lessons import KINDS, Corpus
from grpo.loop import Run
from grpo.policy_source import check_options, load_policy, save_policy, with_threads
from grpo.publisher import Publisher
from grpo.run.memory_errors import phase
from grpo.run.metrics import rollout_metrics
from grpo.run.pool import open_run_pool, use_costs_of_run
from grpo.sampling import sampling_params
from grpo.task import Task
from policies import presets
from policies.conversion.head import start_head
from policies.layout import WeightFiles, mtp_layers
from policies.policy import Policy, PolicyError, read_config
from rollout.group import RolloutGroup
from rollout.pool import Pool

FITTED_EXAMPLES = 128  # training examples that a new head is fitted to
HELD_OUT = 8  # one of so many training prompts: its rollouts are not taught


def mtp(config: MtpConfig, *, resume: str | None = None, stop_after: int | None = None, force: bool = False) -> Result:
    """The policy is saved to `output_dir/policy`.

    Raises Stopped when the run was asked to end early, PolicyError for a model that can have no draft head.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("quartet mtp teaches in one process; start it without accelerate (rollout.workers may sample)")
    _check_model(config)
    config = with_threads(config, resume)
    flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
    last = config.steps + config.head.epochs
    with Task.of(config) as task, Run.open(config, last, task.describe_rewards(), **flags) as run:
        task.record_split(run.log)
        streams = _Streams(task.train, config)
        policy = _policy_with_head(config, task, begins=run.saved is None)
        with phase("loading", config):
            learner = HeadLearner(policy, config.head, temperature=config.rollout.temperature, seed=config.seed)
        run.restore(learner=learner, prompts=streams)
        if learner.ended:
            run.last = run.start
        with open_run_pool(policy, config.rollout, config.dtype, run.stop, run.log) as pool:
            use_costs_of_run(pool, policy, config.rollout, run.folder, resumes=run.step > 0)
            sampling = sampling_params(policy, config.rollout, config.eval.samples, config.seed)
            sampling = replace(sampling, draft_tokens=config.head.depth)
            publisher = Publisher(pool, learner, sampling)
            with phase("publishing", config):
                publisher.publish()
            held_out = HeldOut(task, policy, pool, run.log, config.eval, sampling)
            corpus = Corpus(run.folder / "corpus")
            with run:
                if run.step == 0:
                    _evaluate(held_out, 0, "before")
                with run.log.progress() as progress:
                    bar = progress.add_task("sampling what the draft head learns from", total=config.steps)
                    teaching = progress.add_task("teaching the draft head", total=config.head.epochs)
                    for step in run.steps():
                        if step <= config.steps:
                            _sample(run, task, streams, pool, learner, corpus, step)
                        else:
                            _teach(run, learner, corpus, step)
                        if learner.ended:
                            run.last = step
                        if step == run.last:
                            with run.timed("time/publish"), phase("publishing", config):
                                run.metrics |= publisher.publish()
                        run.record(pool.metrics())
                        run.save_if_due()
                        progress.update(bar, completed=min(step, config.steps))
                        progress.update(teaching, completed=max(step - config.steps, 0))
                if not run.ended_before:
                    _evaluate(held_out, run.last, "after")
        save_policy(policy, run.folder / "policy", run.last)
    return Result(run.folder, policy, held_out.results)


def _check_model(config: MtpConfig) -> str:
    """The checkpoint or preset of the model, which must be one that can have a head, also with `add_mtp: false`."""
    return check_options(config.model_copy(update={"add_mtp": True}))


def _policy_with_head(config: MtpConfig, task: Task, begins: bool) -> Policy:
    """The policy, with the head that its checkpoint brings, or with one that starts as the trunk's last layer."""
    policy = load_policy(config, task.corpus())
    if policy.mtp is None:
        raise PolicyError(f"add_mtp=False, but model={config.model!r} has no MTP head to teach; leave add_mtp out")
    task.check_lengths(policy, config.rollout.max_completion_tokens)
    if config.head.draft_vocabulary is None:
        policy.draft_ids = None
    if begins and (config.head.restart or (config.head.restart is None and not stores_head(config))):
        taught, _ = split(task.train)
        policy.mtp.load_state_dict(start_head(policy.trunk, _fitting_text(task, taught, policy)).state_dict())
    return policy


def _fitting_text(task: Task, examples: Sequence[Example], policy: Policy) -> list[torch.Tensor]:
    """Prompts with their gold solutions, token ids [T] each."""
    tokenizer, windows = policy.tokenizer, []
    for example in examples[:FITTED_EXAMPLES]:
        ids = list(task.prompt(example, tokenizer).token_ids)
        ids += tokenizer(example.solution, add_special_tokens=False).input_ids
        windows.append(torch.tensor(ids[: policy.max_length]))
    return windows


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Whose rollouts are taught, and whose tell what an epoch gains."""
    kept = [i % HELD_OUT == 0 for i in range(len(examples))]
    return [e for e, k in zip(examples, kept, strict=True) if not k], [e for e, k in zip(examples, kept, strict=True) if k]


class _Streams:
    """In which order prompts are taken: those that are taught, those that are held out, and gold solutions."""

    def __init__(self, examples: Sequence[Example], config: MtpConfig) -> None:
        taught, held_out = split(examples)
        self.held_out = -(-config.prompts_per_step // HELD_OUT)
        self.taught, self.solutions = config.prompts_per_step - self.held_out, config.head.solutions
        if self.solutions > len(taught):
            raise ValueError(f"head.solutions={self.solutions}, but {len(taught)} examples are learned from; lower it")
        self.streams = {
            "taught": PromptStream(taught, config.seed),
            "held_out": PromptStream(held_out, config.seed),
            "solutions": PromptStream(taught, config.seed + 1),
        }

    def take(self) -> dict[str, list[Example]]:
        """The examples of the next step."""
        counts = {"taught": self.taught, "held_out": self.held_out, "solutions": self.solutions}
        return {name: self.streams[name].take(count) if count else [] for name, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: stream.state_dict() for name, stream in self.streams.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, stream in self.streams.items():
            stream.load_state_dict(state[name])


def _sample(
    run: Run[MtpConfig], task: Task, streams: _Streams, pool: Pool, learner: HeadLearner, corpus: Corpus, step: int
) -> None:
    """A step of the corpus: the rollouts of the next prompts and the next solutions, as the trunk reads them."""
    config, policy, options = run.config, learner.policy, learner.head_options
    taken = streams.take()
    prompts = [task.prompt(example, policy.tokenizer) for kind in ("taught", "held_out") for example in taken[kind]]
    params = sampling_params(policy, config.rollout, config.rollout.group_size, config.seed).at(step)
    with run.timed("time/rollout"), phase("sampling", config):
        groups = pool.sample(prompts, params)
    metrics = rollout_metrics(groups, [])
    run.metrics |= {name: value for name, value in metrics.items() if not name.startswith(("reward/", "group/"))}
    run.stop.check()
    stop = policy.stop_token_ids[0]
    solutions = [task.solution(example, policy.tokenizer, stop) for example in taken["solutions"]]
    taught, held_out = groups[: streams.taught], groups[streams.taught :]
    with run.timed("time/learn"), phase("learning", config):
        lessons = {
            "taught": learner.read([*rows_of(taught, options.tokens_per_update), *solutions]),
            "held_out": learner.read(rows_of(held_out, options.tokens_per_update), held_out, params),
        }
        if step == 1 and options.draft_vocabulary is not None:
            policy.draft_ids = learner.frequent_tokens(lessons["taught"], options.draft_vocabulary)
        if policy.draft_ids is not None:
            run.metrics["draft/vocabulary_coverage"] = coverage(groups, policy.draft_ids)
        run.learn(lambda: corpus.add(step, lessons), rate="head.learning_rate")


def _teach(run: Run[MtpConfig], learner: HeadLearner, corpus: Corpus, step: int) -> None:
    """An epoch over the corpus."""
    device, epoch = learner.policy.device, step - run.config.steps
    taught, held_out = (corpus.lessons(kind, run.config.steps, device) for kind in KINDS)
    with run.timed("time/learn"), phase("learning", run.config):
        run.learn(lambda: learner.teach(taught, held_out, epoch, step), rate="head.learning_rate")


def _evaluate(held_out: HeldOut, step: int, when: str) -> None:
    """Drafts at every depth, on held-out prompts with the same noise before and after."""
    if found := held_out.evaluate(step, when):
        accepted = enumerate(found[f"{when}, sampled"].acceptance, start=1)
        held_out.log.evaluation(step, {f"eval/acceptance_depth_{depth}": share for depth, share in accepted})


def stores_head(config: MtpConfig) -> bool:
    """Whether the checkpoint has MTP layers; a preset's head is as random as its trunk, and stays."""
    model = check_options(config)
    return model in presets.PRESETS or bool(mtp_layers(read_config(model), WeightFiles(model).shapes))


def rows_of(groups: Sequence[RolloutGroup], max_tokens: int) -> list[PackedRow]:
    """Every group with its prompt once, cut where it is longer than `max_tokens`."""
    return [
        row
        for number, group in enumerate(groups)
        for row in split_rows(
            group.prompt.token_ids,
            [Sample(i, c.token_ids) for i, c in enumerate(group.completions)],
            max_tokens,
            group=number,
        )
    ]


def coverage(groups: Sequence[RolloutGroup], draft_ids: torch.Tensor) -> float:
    """Share of the sampled tokens that can be drafted."""
    sampled = torch.tensor([token for group in groups for c in group.completions for token in c.token_ids])
    return torch.isin(sampled, draft_ids.cpu()).float().mean().item()
