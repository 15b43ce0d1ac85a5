"""What a run refuses before its first step, as far as it can be seen without weights.

The command, `train` in Python and `--dry_run` ask the same functions, so they refuse the same, in the same words
(contract 20), and all that is wrong is told in one message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from grpo.checks.parts import CHECKS, check_processes
from grpo.config.environment import rewards_of
from grpo.config.mtp import MtpConfig
from grpo.config.run import RunConfig, SftConfig
from grpo.run.checkpoint import CheckpointError
from grpo.run.hardware import device_of
from grpo.task.task import Task, reward_specs
from rewards.protocol import RewardError
from rewards.scorer import Scorer
from rollout.faults import RolloutError

REFUSALS = (ValueError, OSError, RewardError, RolloutError, CheckpointError)  # whose message is written for the user


class Refused(ValueError):
    """Several things are wrong with a run; the message has a line for each."""


def check_run(config: SftConfig | MtpConfig, *, on_cpu: bool | None = None) -> None:
    """Raises what is wrong, and Refused for several things: then data and rewards are looked at, too, so that all is
    told at once. `on_cpu`: whether the run will be on CPUs, where that is not `config.device`'s to say."""
    on_cpu = device_of(config.device).type == "cpu" if on_cpu is None else on_cpu
    errors = _failures(*(partial(check, config) for check in CHECKS), partial(check_processes, config, on_cpu))
    if errors:
        raise _as_one([*errors, *_failures(partial(_load_data, config), partial(_load_rewards, config))])


def open_task(config: SftConfig | MtpConfig, *, scores: bool = True) -> Task:
    """The task of a run. Where its data are wrong, its rewards are looked at as well."""
    try:
        return Task.of(config, scores=scores)
    except REFUSALS as error:
        whole = _as_one([error, *(_failures(partial(_load_rewards, config)) if scores else [])])
        if whole is error:
            raise
        raise whole from error


def _failures(*checks: Callable[[], None]) -> list[Exception]:
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


def _load_data(config: SftConfig | MtpConfig) -> None:
    Task.of(config, model_known=False).close()


def _load_rewards(config: RunConfig) -> None:
    options = config.reward
    Scorer(reward_specs(rewards_of(config)), on_error=options.on_error, pass_variables=options.pass_variables).close()
