"""`quartet mtp`: a policy teaches its own draft head.

Each of the first steps, in the order of the code below:
1. samples groups from the policy,
2. reads them once with the frozen trunk, and keeps what the draft head can learn from on disk.

Each of the others is an epoch over all of that, which
3. teaches the draft head the trunk's distributions at every depth,
4. measures on the rollouts of other prompts which drafts the trunk would have taken, and is undone if they are no more.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo.config.mtp import MtpConfig
from grpo.evaluation.held_out import Result
from grpo.learner.batch import split_rows
from grpo.learner.head_learner import HeadLearner
from grpo.learner.lessons import KINDS, Corpus
from grpo.learner.row import PackedRow, Sample
from grpo.run.log import RunLog
from grpo.run.metrics import rollout_metrics
from grpo.run.stop import signals
from grpo.session import Session
from grpo.source.policy_source import find_policy
from grpo.steps.callback import Callback
from grpo.steps.collector import Collector
from grpo.steps.loop import Run
from grpo.steps.opening import first_policy, open_run
from grpo.steps.pool import sampling_of
from grpo.task.task import Task
from policies import presets
from policies.conversion.head import start_head
from policies.layout import WeightFiles
from policies.mtp_layers import mtp_layers
from policies.policy import Policy, read_config
from rewards.data.examples import Example
from rollout.group import RolloutGroup

METRICS = {
    "corpus/trained_tokens": "tokens of this step on which the MTP head is trained (quartet mtp), count",
    "corpus/held_out_tokens": "the same of held-out rollouts, which measure what an epoch gains, count",
    "draft/held_out_acceptance_depth_<d>": "drafts at depth d that the base model would have accepted in held-out "
    "rollouts after an epoch / chains of that depth (quartet mtp)",
    "draft/held_out_tokens_per_forward": "1 + the sum of draft/held_out_acceptance_depth_<d>",
    "draft/vocabulary_coverage": "sampled tokens that are in the trimmed draft vocabulary, fraction",
    "curriculum/draft_depth": "depth to which the MTP head is unrolled at this step",
    "speed/trained_tokens_per_second": "tokens of an epoch on which the MTP head was trained / seconds (quartet mtp)",
    "eval/acceptance_depth_<d>": "draft/acceptance_depth_<d> on held-out prompts (quartet mtp)",
}
FITTED_EXAMPLES = 128  # training examples that a new draft head is fitted to
HELD_OUT = 8  # one of so many training prompts: its rollouts are not taught


def mtp(config: MtpConfig, *, resume: str | None = None, stop_after: int | None = None, force: bool = False) -> Result:
    """The policy is saved to `output_dir/policy`.

    Raises Stopped when the run was asked to end early, PolicyError for a model that can have no draft head.
    """
    flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
    last = config.steps + config.mtp.epochs
    with open_run(config, last, ready=lambda task: Streams(task, config), **flags) as (run, task):
        config, streams = run.config, Streams(task, config)
        policy = _policy_with_head(run, task)
        with run.phase("loading"):
            learner = HeadLearner(policy, config.mtp, temperature=config.rollout.temperature, seed=config.seed)
        params = sampling_of(run, policy, config.rollout.group_size)
        collector = Collector(run, task, policy, params, streams.streams["taught"], [Depths(run.log)])
        session = Session(run, task, learner, collector)
        corpus, sampling = Corpus(run.folder / "corpus"), session.held_out.sampling
        session.sync_check = session.held_out.sampling = replace(sampling, draft_tokens=config.mtp.depth)
        run.restore(learner=learner, prompts=streams)
        if learner.ended:
            run.last = run.start
        with session.start_steps():
            with run.log.progress() as progress:
                bar = progress.add_task("sampling what the draft head learns from", total=config.steps)
                teaching = progress.add_task("teaching the draft head", total=config.mtp.epochs)
                for step in run.steps():
                    if step <= config.steps:
                        metrics = _sample(session, streams, learner, corpus, step)
                    else:
                        metrics = _teach(run, learner, corpus, step)
                    run.reached()
                    if learner.ended:
                        run.last = step
                    if step == run.last:
                        session.sync_weights()
                    session.record(step, metrics)
                    run.save_if_due(also=step >= config.steps)  # an epoch takes long
                    progress.update(bar, completed=min(step, config.steps))
                    progress.update(teaching, completed=max(step - config.steps, 0))
            return session.finish()


def _policy_with_head(run: Run[MtpConfig], task: Task) -> Policy:
    """The policy, with the draft head that its checkpoint brings, or with one that starts as the trunk's last layer."""
    config, policy = run.config, first_policy(run, task)
    assert policy.mtp is not None  # the table of contradictions refuses models that can have none
    if config.mtp.draft_vocabulary is None:
        policy.draft_ids = None
    if run.saved is None and (config.mtp.restart or (config.mtp.restart is None and not stores_head(config.model))):
        taught, _ = split(task, config.seed)
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


def split(task: Task, seed: int) -> tuple[list[Example], list[Example]]:
    """Whose rollouts are taught, and whose tell what an epoch gains: an eighth of the problems, by content and seed."""
    of_problem: dict[str, list[Example]] = {}
    for example in task.train:
        [fingerprint] = task.fingerprints([example])
        of_problem.setdefault(fingerprint, []).append(example)
    problems = list(of_problem)
    random.Random(f"held_out/{seed}").shuffle(problems)
    held_out = {id(e) for fingerprint in problems[: -(-len(problems) // HELD_OUT)] for e in of_problem[fingerprint]}
    return [e for e in task.train if id(e) not in held_out], [e for e in task.train if id(e) in held_out]


class Streams:
    """In which order prompts are taken: those that are taught, those that are held out, and gold solutions."""

    def __init__(self, task: Task, config: MtpConfig) -> None:
        taught, held_out = split(task, config.seed)
        held = -(-config.prompts_per_step // HELD_OUT)
        self.counts = {"taught": config.prompts_per_step - held, "held_out": held, "solutions": config.mtp.solutions}
        for key, kind in (("mtp.solutions", "solutions"), ("prompts_per_step", "taught")):
            if self.counts[kind] > len(taught):
                raise ValueError(
                    f"{key}={self.counts[kind]}, but {len(taught)} training examples are learned from, and the others "
                    "tell what an epoch gains; lower it, or use more data"
                )
        self.streams = {
            "taught": task.stream(config.seed, taught),
            "held_out": task.stream(config.seed, held_out),
            "solutions": task.stream(config.seed + 1, taught),
        }

    def take_examples(self) -> dict[str, list[Example]]:
        """The examples of the next step."""
        return {name: self.streams[name].take_examples(count) if count else [] for name, count in self.counts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: stream.state_dict() for name, stream in self.streams.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, stream in self.streams.items():
            stream.load_state_dict(state[name])


def _sample(session: Session, streams: Streams, learner: HeadLearner, corpus: Corpus, step: int) -> dict[str, float]:
    """A step of the corpus: the rollouts of the next prompts and the next solutions, as the trunk reads them."""
    run, task, policy, most = session.run, session.task, learner.policy, learner.head_options.tokens_per_update
    examples = streams.take_examples()
    prompts = [task.prompt(example, policy.tokenizer) for kind in KINDS for example in examples[kind]]
    groups = session.sample(prompts, step=step, head_accepted=())
    metrics = rollout_metrics(groups, [])
    run.metrics |= {name: value for name, value in metrics.items() if not name.startswith(("reward/", "group/"))}
    signals.check()
    stop = policy.stop_token_ids[0]
    solutions = [_cut(task.solution(e, policy.tokenizer, stop), policy.max_length) for e in examples["solutions"]]
    taught, held_out = groups[: len(examples["taught"])], groups[len(examples["taught"]) :]
    with run.timed("time/learn"), run.phase("learning"):
        lessons = {
            "taught": learner.read([*rows_of(taught, most), *solutions]),
            "held_out": learner.read(rows_of(held_out, most), held_out, session.collector.params(step).at(step)),
        }
        return run.learn(lambda: corpus.add(step, lessons), rate="mtp.learning_rate")


def _cut(row: PackedRow, length: int) -> PackedRow:
    """A gold solution up to the end of the policy's context."""
    [solution] = row.samples
    token_ids = solution.token_ids[: length - len(row.prompt_token_ids)]
    return replace(row, samples=[replace(solution, token_ids=token_ids)])


def _teach(run: Run[MtpConfig], learner: HeadLearner, corpus: Corpus, step: int) -> dict[str, float]:
    """An epoch over the corpus."""
    device, epoch = learner.policy.device, step - run.config.steps
    taught, held_out = (corpus.lessons(kind, run.config.steps, device) for kind in KINDS)
    with run.timed("time/learn"), run.phase("learning"):
        if epoch == 1 and (size := learner.head_options.draft_vocabulary) is not None:
            learner.policy.draft_ids = learner.frequent_tokens(corpus.lessons("taught", 1, device), size)
        return run.learn(lambda: learner.teach(taught, held_out, epoch, step), rate="mtp.learning_rate")


class Depths(Callback):
    """Records which share of the drafts at every depth was accepted in an evaluation."""

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def on_evaluate(self, step: int, results: Mapping[str, Any]) -> None:
        accepted = enumerate(results["sampled"].acceptance, start=1)
        self.log.evaluation(step, {f"eval/acceptance_depth_{depth}": share for depth, share in accepted})


def stores_head(model: str) -> bool:
    """Whether the policy brings MTP layers; a preset's draft head is as random as its trunk, and stays."""
    source = find_policy(model)
    if source.saved is not None:  # the checkpoint of a run may have a head that the run's own model has not
        return any(name.startswith("mtp.") for name in source.saved.tensors["policy"])
    model = source.base
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
