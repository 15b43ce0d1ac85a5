"""`quartet mtp`: a policy teaches its own draft head.

One step, as told by the code below:
1. sample groups from the policy, with drafts by the head as it is so far (lossless: it is the policy that speaks),
2. read them once with the frozen trunk,
3. pass over them several times, teaching the head the trunk's distributions at every depth,
4. publish the head to the sampler, which then drafts better.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV3Config

from grpo.commands import memory
from grpo.config.mtp import MtpConfig
from grpo.config.options import dump_yaml
from grpo.data.prompts import PromptStream
from grpo.evaluation.evaluate import Evaluation, evaluate_run
from grpo.learner.batch import PackedRow, Sample, split_rows
from grpo.learner.head_learner import HeadLearner, Lesson
from grpo.learner.learner import NonFiniteStep
from grpo.loader import check_options, load_policy, sampling_params
from grpo.policy_source import save_policy
from grpo.run import checkpoint
from grpo.run.lock import RunLock
from grpo.run.log import RunLog
from grpo.run.metrics import rollout_metrics
from grpo.run.pool import open_run_pool, use_costs_of_run
from grpo.run.resume import saved_state
from grpo.run.reward_record import record_rewards
from grpo.run.stop import Boundary, GivenUp, StopSignal
from grpo.run.threads import with_threads
from grpo.task import Task
from policies import presets
from policies.conversion.head import start_head
from policies.layout import WeightFiles, mtp_layers
from policies.mtp import MTPHead
from policies.policy import Policy, PolicyError, read_config
from rollout.group import RolloutGroup
from rollout.pool import Pool

FITTED_EXAMPLES = 128  # training examples that a new head is fitted to


def mtp(
    config: MtpConfig, *, resume: str | None = None, stop_after: int | None = None, force: bool = False
) -> dict[str, Any]:
    """Returns what the summary shows; the policy is saved to `output_dir/policy`.

    Raises Stopped when the run was asked to end early, PolicyError for a model that can have no draft head.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("quartet mtp teaches in one process; start it without accelerate (rollout.workers may sample)")
    _check_model(config)
    with RunLock(config.output_dir) as lock:
        return _mtp(config, lock, resume, stop_after, force)


def _mtp(config: MtpConfig, lock: RunLock, resume: str | None, stop_after: int | None, force: bool) -> dict[str, Any]:
    config = with_threads(config, resume)
    saved = saved_state(config, resume=resume, force=force, stop_after=stop_after, steps=config.steps)
    resume_step = None if resume is None else saved.step if saved else 0
    with (
        Task.of(config) as task,
        RunLog(
            config.output_dir,
            dump_yaml(config),
            table_every=0,
            trackers=config.log.trackers,
            resume_step=resume_step,
            lock=lock,
            unwritten=saved.state.get("unwritten") if saved else None,
        ) as run_log,
        run_log.until_its_end(),
        StopSignal() as stop,
    ):
        record_rewards(run_log, task.scorer.describe())
        task.record_split(run_log)
        try:
            return HeadTraining(config, task, run_log, stop, stop_after).run(saved)
        except GivenUp:  # before the steps
            raise stop.stopped(resume_step or 0) from None


def _check_model(config: MtpConfig) -> str:
    """The checkpoint or preset that is meant; also with `add_mtp: false` it must be one that can have a head."""
    return check_options(config.model_copy(update={"add_mtp": True}))


def dry_run(config: MtpConfig, console: Console) -> tuple[list[memory.DeviceMemory], float]:
    """Check data, template, rewards and model without training; print counts, and FLOPs per token of the head. Returns
    the memory by device, and the bytes on disk."""
    shape, _ = memory.read_shape(config.model_copy(update={"add_mtp": True}))
    assert isinstance(shape, DeepseekV3Config)  # others have been refused
    with torch.device("meta"):
        head = MTPHead(shape)
    own = sum(p.numel() for name, p in head.named_parameters() if ".experts." not in name)
    own += sum(
        p.numel() * shape.num_experts_per_tok // shape.n_routed_experts
        for name, p in head.named_parameters()
        if ".experts." in name
    )
    depth, width = config.head.depth, min(config.head.draft_vocabulary or shape.vocab_size, shape.vocab_size)
    completions = config.prompts_per_step * config.rollout.group_size
    with Task.of(config) as task:
        task.check_chat_template(config.model)
        table = Table(title="dry run: nothing was trained", show_header=False)
        table.add_row("training examples", f"{len(task.train):,} ({config.data.name}, {config.data.split})")
        table.add_row("held-out examples", f"{len(task.heldout):,}")
    table.add_row("steps", f"{config.steps:,} × {completions:,} completions, {config.head.reuse} passes over each")
    table.add_row("completions in all", f"{config.steps * completions:,}")
    table.add_row("draft vocabulary", f"{width:,} of {shape.vocab_size:,} tokens")
    table.add_row("head: parameters", f"{sum(p.numel() for p in head.parameters()) / 1e6:,.1f} M, {depth} depths")
    table.add_row("head: FLOPs per token and pass", f"{6 * own * depth / 1e6:,.0f} M")
    table.add_row("LM head: the same", f"{(2 + 4 * depth) * shape.hidden_size * width / 1e6:,.0f} M")
    console.print(table)
    learner = memory.head_learner_memory(shape, config)
    saved = math.ceil(config.steps / config.checkpoint.every)
    kept = min((config.checkpoint.keep or saved) + 1, saved)  # the next one is complete before the oldest goes
    disk = learner.weights + kept * (learner.gradients + learner.moments)
    return memory.memory_of_run(shape, True, config), disk


class HeadTraining:
    """One run in one folder."""

    def __init__(
        self, config: MtpConfig, task: Task, run_log: RunLog, stop: StopSignal, stop_after: int | None
    ) -> None:
        self.config, self.task, self.run_log, self.stop, self.stop_after = config, task, run_log, stop, stop_after
        self.checkpoints = config.output_dir / "checkpoints"
        self.evaluations: dict[str, Evaluation] = {}

    def run(self, saved: checkpoint.Checkpoint | None) -> dict[str, Any]:
        config, rollout = self.config, self.config.rollout
        policy = load_policy(config, self.task.corpus())
        if policy.mtp is None:
            raise PolicyError(f"add_mtp=False, but model={config.model!r} has no MTP head to teach; leave add_mtp out")
        self.task.check_lengths(policy, rollout.max_completion_tokens)
        if config.head.draft_vocabulary is None:
            policy.draft_ids = None
        if not saved and (config.head.restart or (config.head.restart is None and not stores_head(config))):
            policy.mtp.load_state_dict(start_head(policy.trunk, self._fitting_text(policy)).state_dict())
        learner = HeadLearner(
            policy, config.head, temperature=rollout.temperature, steps=config.steps, seed=config.seed
        )
        stream, start = PromptStream(self.task.train, config.seed), 0
        if saved:
            learner.load_state(saved.tensors, saved.state["learner"])
            stream.load_state_dict(saved.state["prompts"])
            policy.draft_ids = saved.tensors["draft"]["ids"].to(policy.device) if "draft" in saved.tensors else None
            start = saved.step
        checkpoint.discard_after(self.checkpoints, start)
        pool = open_run_pool(policy, config, self.stop, self.run_log)
        try:
            use_costs_of_run(pool, policy, config, resumes=start > 0)
            finished_before = start == config.steps and (config.output_dir / "policy").exists()
            self._steps(learner, stream, pool, start, finished_before)
        finally:
            pool.close()
        save_policy(policy, config.output_dir / "policy", config.steps)
        return {"output_dir": str(config.output_dir), "evaluations": self.evaluations}

    def _fitting_text(self, policy: Policy) -> list[torch.Tensor]:
        """Prompts with their gold solutions, token ids [T] each."""
        tokenizer, windows = policy.tokenizer, []
        for example in self.task.train[:FITTED_EXAMPLES]:
            ids = list(self.task.prompt(example, tokenizer).token_ids)
            ids += tokenizer(example.solution, add_special_tokens=False).input_ids
            windows.append(torch.tensor(ids[: policy.max_length]))
        return windows

    def _steps(self, learner: HeadLearner, stream: PromptStream, pool: Pool, start: int, finished_before: bool) -> None:
        config = self.config
        save = partial(self._save, learner=learner, stream=stream)
        with Boundary(start, save, self.run_log, self.stop) as boundary:
            if start == 0:
                self._evaluate("before", learner.policy, pool, 0)
            with self.run_log.progress() as progress:
                bar = progress.add_task("teaching the draft head", total=config.steps, completed=start)
                for step in range(start + 1, config.steps + 1):
                    self._step(step, learner, stream, pool, boundary)
                    progress.advance(bar)
                    stopping = step == self.stop_after and step < config.steps
                    if stopping or step % config.checkpoint.every == 0 or step == config.steps:
                        boundary.save()
                    if stopping:
                        raise boundary.stopped()
            if not finished_before:
                self._evaluate("after", learner.policy, pool, config.steps)

    def _step(self, step: int, learner: HeadLearner, stream: PromptStream, pool: Pool, boundary: Boundary) -> None:
        """Sample, read, teach, publish. What ends it before the first update, such as GivenUp where a stop was asked
        for, leaves the prompts as they were; after that the step is reached, and has its line."""
        config, policy, updates, before = self.config, learner.policy, learner.updates, stream.state_dict()
        times: defaultdict[str, float] = defaultdict(float)
        taught: dict[str, float] = {}
        started = clock = time.perf_counter()
        try:
            prompts = [self.task.prompt(example, policy.tokenizer) for example in stream.take(config.prompts_per_step)]
            sampling = sampling_params(policy, config.rollout, config.rollout.group_size, config.seed)
            groups = pool.sample(prompts, sampling.at(step))
            times["time/rollout"] = time.perf_counter() - clock
            self.stop.check()
            clock = time.perf_counter()
            lessons = learner.read(rows_of(groups, config.head.tokens_per_update))
            if step == 1 and config.head.draft_vocabulary is not None:
                policy.draft_ids = learner.frequent_tokens(lessons, config.head.draft_vocabulary)
            taught = self._teach(learner, lessons, step)
            boundary.reached(step)
            times["time/learn"] = time.perf_counter() - clock
            clock = time.perf_counter()
            pool.publish(learner.weights(), learner.policy_version)
            times["time/publish"] = time.perf_counter() - clock
        finally:
            if boundary.step == step or learner.updates != updates:  # also where it was cut short after an update
                boundary.reached(step)
                times["time/step"] = time.perf_counter() - started
                self._record(step, groups, policy, pool, taught | times)
            else:
                stream.load_state_dict(before)

    def _teach(self, learner: HeadLearner, lessons: Sequence[Lesson], step: int) -> dict[str, float]:
        try:
            return learner.teach(lessons, step)
        except NonFiniteStep as error:
            raise NonFiniteStep(
                f"{error}. The update was not made: lower head.learning_rate and go on with --resume auto --force"
            ) from None

    def _record(
        self, step: int, groups: Sequence[RolloutGroup], policy: Policy, pool: Pool, taught: dict[str, float]
    ) -> None:
        metrics = rollout_metrics(groups, []) | taught
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("reward/", "group/"))}
        if policy.draft_ids is not None:
            metrics["draft/vocabulary_coverage"] = coverage(groups, policy.draft_ids)
        metrics["speed/completion_tokens_per_second"] = metrics["completion/tokens"] / metrics["time/rollout"]
        metrics["memory/rss_gib"] = psutil.Process().memory_info().rss / 2**30
        self.run_log.step(step, metrics | pool.metrics())

    def _evaluate(self, when: str, policy: Policy, pool: Pool, step: int) -> None:
        """Drafts at every depth, on held-out prompts with the same noise before and after."""
        if not self.task.heldout:
            return
        prompts = [self.task.prompt(example, policy.tokenizer) for example in self.task.heldout]
        sampling = sampling_params(policy, self.config.rollout, 1, self.config.seed)
        sampling = replace(sampling, draft_tokens=self.config.head.depth)
        results = evaluate_run(pool, self.task, prompts, sampling, self.config.eval, self.run_log, step)
        accepted = enumerate(results["sampled"].acceptance, start=1)
        self.run_log.evaluation(step, {f"eval/acceptance_depth_{d}": share for d, share in accepted})
        self.evaluations |= {f"{when}, {name}": result for name, result in results.items()}

    def _save(self, step: int, learner: HeadLearner, stream: PromptStream) -> None:
        tensors, state = learner.state()
        if learner.policy.draft_ids is not None:
            tensors["draft"] = {"ids": learner.policy.draft_ids}
        everything = {"learner": state, "prompts": stream.state_dict(), **self.run_log.state()}
        checkpoint.save(self.checkpoints, step, tensors, everything, keep=self.config.checkpoint.keep)


def stores_head(config: MtpConfig) -> bool:
    """Whether the checkpoint has MTP layers; a preset's head is as random as its trunk, and stays."""
    model = check_options(config)
    return model in presets.PRESETS or bool(mtp_layers(read_config(model), WeightFiles(model).shapes))


def rows_of(groups: Sequence[RolloutGroup], max_tokens: int) -> list[PackedRow]:
    """Every group with its prompt once, cut where it is longer than `max_tokens`."""
    return [
        row
        for group in groups
        for row in split_rows(
            group.prompt.token_ids, [Sample(i, c.token_ids) for i, c in enumerate(group.completions)], max_tokens
        )
    ]


def coverage(groups: Sequence[RolloutGroup], draft_ids: torch.Tensor) -> float:
    """Share of the sampled tokens that can be drafted."""
    sampled = torch.tensor([token for group in groups for c in group.completions for token in c.token_ids])
    return torch.isin(sampled, draft_ids.cpu()).float().mean().item()
