"""What a command refuses before anything is loaded, as far as it can be seen without weights.

Every command, `train`, `sft` and `mtp` in Python and `--dry_run` ask the same function, so they refuse the same, in the
same words (contract 20), and all that is wrong is told in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from grpo.config.environment import rewards_of
from grpo.config.mtp import MtpConfig
from grpo.config.policy import ModelOptions
from grpo.config.run import LearningConfig, RunConfig
from grpo.source.policy_source import PolicySource
from grpo.task.parts import FIRST, OF_MODEL, TRIES, check_processes
from grpo.task.plan import REFUSALS, Plan
from grpo.task.sources import sources_of
from grpo.task.table import contradictions
from grpo.task.task import Task, reward_specs
from policies.devices import device_of
from rewards.opened import listing
from rewards.scorer import Scorer


class Refused(ValueError):
    """Several things are wrong with a run; the message has a line for each."""


def check_plan(options: ModelOptions, source: PolicySource | None = None, *, on_cpu: bool | None = None) -> Plan:
    """Finds what the loader needs to know. Raises what is wrong, and Refused for several things: then data and rewards
    of a run are looked at, too, so that all is told at once.

    `source` is what `options.model` means, where that is known. `on_cpu`: whether the run will be on CPUs, where that
    is not `options.device`'s to say.
    """
    plan = Plan(options, source)
    on_cpu = device_of(options.device).type == "cpu" if on_cpu is None else on_cpu
    errors = _failures(partial(check, plan) for check in FIRST)
    lines = [ValueError(line) for line in contradictions(plan)]
    errors += lines or _failures(partial(check, plan) for check in TRIES)
    errors += [plan.fault] if plan.fault else _failures(partial(check, plan) for check in OF_MODEL)
    errors += _failures([partial(check_processes, plan, on_cpu)])
    if errors and isinstance(options, LearningConfig | MtpConfig):
        errors += _failures([lambda: task_of(options, model_known=False).close(), partial(_load_rewards, options)])
    if errors:
        raise _as_one(errors)
    return plan


@contextmanager
def open_task(config: LearningConfig | MtpConfig, *, scores: bool = True) -> Iterator[Task]:
    """The task of a run. Where its data are wrong, its rewards are looked at as well."""
    with ExitStack() as stack:
        opened = stack.enter_context(listing())
        try:
            task = task_of(config, scores=scores)
        except REFUSALS as error:
            whole = _as_one([error, *(_failures([partial(_load_rewards, config)]) if scores else [])])
            if whole is error:
                raise
            raise whole from error
        stack.enter_context(task)
        task.sources = sources_of(config, opened)
        yield task


def task_of(config: LearningConfig | MtpConfig, *, scores: bool = True, model_known: bool = True) -> Task:
    """Opens the task of a run, whether it has one source of data or several."""
    if len(config.data) > 1:
        from grpo.task.mix import Mix

        return Mix(config, scores=scores, model_known=model_known)
    return Task.of(config, scores=scores, model_known=model_known)


def _failures(checks: Iterable[Callable[[], Any]]) -> list[Exception]:
    errors: list[Exception] = []
    for check in checks:
        try:
            check()
        except REFUSALS as error:
            errors.append(error)
    return errors


def _as_one(errors: list[Exception]) -> Exception:
    """The error, or one that has the words of all of them; the same words count once."""
    different = list(dict.fromkeys(map(str, errors)))
    if len(different) == 1:
        return errors[0]
    return Refused("\n  ".join([f"{len(different)} things are wrong with this run:", *different]))


def _load_rewards(config: RunConfig) -> None:
    options = config.reward
    Scorer(reward_specs(rewards_of(config)), on_error=options.on_error, pass_variables=options.pass_variables).close()
