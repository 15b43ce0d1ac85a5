"""How every training begins: its plan is checked, its processes join, its task and its folder are opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from grpo.config.mtp import MtpConfig
from grpo.config.problems import python_words
from grpo.config.run import LearningConfig, TrainConfig
from grpo.learner.parallel import ALONE, joined
from grpo.run.hardware import device_of
from grpo.source.policy_source import in_4_bits, load_policy, with_threads
from grpo.steps.loop import Run
from grpo.task.check import check_plan, open_task
from grpo.task.task import Task
from policies import four_bit
from policies.policy import Policy

Config = TypeVar("Config", bound=LearningConfig | MtpConfig)


@contextmanager
def open_run(
    config: Config,
    last: int,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    ready: Callable[[Task], object] = lambda task: None,
) -> Iterator[tuple[Run[Config], Task]]:
    """The run of `last` steps in its folder, and what it is about. Everything that can be refused is refused before the
    folder is touched, also what `ready` raises when it sees the task."""
    config = with_threads(config, resume, check_plan(config).shape)
    with ExitStack() as stack:
        stack.enter_context(python_words())
        ranks = ALONE
        if isinstance(config, LearningConfig):
            ranks = stack.enter_context(joined(device_of(config.device).type == "cpu", config.learner.parallel))
        task = stack.enter_context(open_task(config, scores=ranks.first))
        ready(task)
        flags: dict[str, Any] = {"resume": resume, "stop_after": stop_after, "force": force}
        run = stack.enter_context(Run.open(config, last, task.describe_rewards(), ranks=ranks, **flags))
        task.record_split(run.log)
        yield run, task


def first_policy(run: Run[TrainConfig], task: Task) -> Policy:
    """The policy that GRPO starts from."""
    config = run.config
    if config.warm_start.steps:
        config = config.model_copy(update={"model": str(run.folder / "warm_start")})
    policy = load_policy(config, task.corpus(), run.ranks)
    if in_4_bits(config):
        run.log.event("base_in_4_bits", **four_bit.counts(policy.trunk))
    task.check_lengths(policy, config.rollout.max_completion_tokens)
    return policy
