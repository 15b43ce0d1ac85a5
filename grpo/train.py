"""A run of GRPO from beginning to end: warm start, then sample, score, learn, publish, and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from grpo.checks.run import check_plan, open_task
from grpo.config.problems import python_words
from grpo.config.reward import with_rewards
from grpo.config.run import TrainConfig
from grpo.data.curriculum import Curriculum
from grpo.endpoint.agent_pool import with_agent
from grpo.evaluation.held_out import HeldOut, Result
from grpo.learner.batch import TrainingBatch
from grpo.learner.build import grpo_learner
from grpo.learner.learner import Learner
from grpo.learner.parallel import ALONE, Ranks
from grpo.run import checkpoint
from grpo.run.memory_errors import phase
from grpo.run.resume import BaseWeights
from grpo.run.stop import signals
from grpo.sft import first_policy, warm_start
from grpo.source.policy_source import save_policy, with_threads
from grpo.steps.ahead import Batches
from grpo.steps.collector import Collector
from grpo.steps.loop import Run
from grpo.steps.pool import open_run_pool, use_costs_of_run
from grpo.steps.publisher import Publisher
from grpo.task.reward_models import load_teacher
from grpo.task.sampling import environment_of, sampling_params
from rewards.protocol import Reward


@python_words()
def train(
    config: TrainConfig,
    *,
    reward: Reward | Sequence[Reward] | None = None,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> Result:
    """The policy is saved to `output_dir/policy`. `reward` are functions of this process in place of `config.rewards`.

    Raises Stopped when the run was asked to end early.
    """
    config = with_rewards(config, reward)
    config = with_threads(config, resume, check_plan(config).shape)
    flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
    with (
        open_task(config, scores=ranks.first) as task,
        Run.open(config, config.steps, task.describe_rewards(), ranks=ranks, **flags) as run,
    ):
        task.record_split(run.log)
        warm_start(run, task)
        policy = first_policy(run, task)
        again = partial(first_policy, run, task)
        teacher = load_teacher(config)
        learner: Learner = grpo_learner(policy, config, task.reward_weights, ranks, again, teacher)
        curriculum = Curriculum(task.train, config.curriculum, config.seed)
        batches = Batches(run, curriculum)
        run.restore(learner=learner, curriculum=batches, **_base(run, learner))
        with (
            open_run_pool(policy, config.rollout, config.dtype, run.log, samples=ranks.first) as pool,
            with_agent(pool, config) as sampler,
            with_agent(pool, config) as examiner,  # in other processes: an agent may remember what it has met
        ):
            sampling = sampling_params(policy, config.rollout, 1, config.seed)
            publisher = Publisher(pool, learner, sampling, config.rollout.quantization)
            with phase("publishing", config):
                publisher.publish()
            collector = Collector(run, task, curriculum, sampler, policy)
            costs_of = config.rollout, run.folder, collector.sampling, collector.longest_prompt
            run.alone(use_costs_of_run, pool, policy, *costs_of, resumes=run.resumes)
            sampling = sampling_params(policy, config.rollout, config.eval.samples, config.seed)
            sampling = replace(sampling, environment=environment_of(config))
            held_out = HeldOut(task, policy, examiner, run.log, config.eval, sampling, collector.evaluated)
            with run:
                batches.begin(collector, learner, partial(_publish, run, publisher))
                if held_out.due(run.step, run.last) and not held_out.done(run.step):
                    run.alone(held_out.evaluate, run.step, "before GRPO" if run.step == 0 else None)
                for step in run.steps():
                    learner.set_draft_depth(collector.draft_depth(step))
                    drawn = batches.take(step)
                    run.metrics |= drawn.metrics
                    run.alone(pool.sleep)
                    batches.go_on(step)
                    with phase("learning", config):
                        batch = learner.prepare(drawn.groups, drawn.scores)
                    collector.keep(step, drawn, batch)
                    learn(run, learner, batch, step, batches)
                    collector.keep(step, drawn, batch, learner.policy_logprobs)
                    evaluates = held_out.due(step, run.last)
                    if not batches.ahead or evaluates or step == run.last:
                        batches.settle()
                        _publish(run, publisher)
                    run.record(pool.metrics() | task.lost())
                    run.save_if_due(config.checkpoint.keep_best and evaluates)
                    if evaluates:
                        run.alone(held_out.evaluate, step)
                if not run.ended_before:
                    run.alone(held_out.evaluate, run.last, "after GRPO")
                speeds = held_out.speeds() if config.log.measure_speed and ranks.first else []
            save_policy(policy, run.folder / "policy", run.last)
            if config.checkpoint.keep_best:
                _save_best(run, learner)
    return Result(run.folder, policy, held_out.results, speeds)


def _publish(run: Run[TrainConfig], publisher: Publisher) -> None:
    """Where the samplers hold an older version."""
    if publisher.version != publisher.learner.policy_version:
        with run.timed("time/publish"), phase("publishing", run.config):
            run.metrics |= publisher.publish()


def learn(run: Run, learner: Learner, batch: TrainingBatch, step: int, batches: Batches) -> None:
    """One step of the learner with a bar of its micro-batches. Until the first update is made, a stop is heeded and
    sampling ahead goes on; what that raises undoes the step."""
    with run.log.progress() as progress:
        bar = progress.add_task(f"step {step}: learning", total=None)

        def advance(finished: int, total: int) -> None:
            progress.update(bar, completed=finished, total=total)
            left = total - finished * learner.options.updates_per_batch
            if left > 0:
                if run.ranks.size == 1:  # several ranks finish their step: they are in it together
                    signals.check()
                batches.go_on(step)
            elif left == 0:
                batches.before_update(step)

        run.learn(
            lambda: learner.step(batch, step, advance),
            rate="learner.learning_rate",
            batch=run.folder / "rollouts" / f"step_{step:06d}.jsonl.zst",
        )
        if not run.moved:  # there may have been nothing to learn
            batches.before_update(step)


def _base(run: Run[TrainConfig], learner: Learner) -> dict[str, BaseWeights]:
    """With LoRA a checkpoint keeps the digest of the weights under the adapters."""
    if not run.config.lora:
        return {}
    warm = f"warm start {run.folder / 'warm_start'}"
    source = warm if run.config.warm_start.steps else f"model={run.config.model!r}"

    def on_change(changed: str) -> None:
        if not run.forced:
            raise ValueError(f"{changed}, or use --force to go on with the new ones")
        run.log.event("base_changed", step=run.start, what=changed)

    return {"base": BaseWeights(learner.policy, learner.state()[0]["policy"], source, run.start, on_change)}


def _save_best(run: Run, learner: Learner) -> None:
    if (best := run.ranks.from_first(run.best_step)) is not None:
        found = checkpoint.load(checkpoint.saved(run.checkpoints)[best], together=True)
        learner.load_state(found.tensors, found.state["learner"])
        save_policy(learner.policy, run.folder / "best_policy", best)
        run.log.event("best", step=best, folder=str(run.folder / "best_policy"))
