"""The functions and classes of the user that a configuration names, and the modules that they import."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from grpo.algorithm.own import is_own
from grpo.config.environment import rewards_of
from grpo.config.mtp import MtpConfig, scores_nothing
from grpo.config.run import LearningConfig, TrainConfig
from grpo.run.sources import Source, Sources
from grpo.task.sampling import agent_of, environment_of
from rewards import registry
from rewards.config.reward import RewardOptions
from rewards.digests import code_digest
from rewards.imported import imported_files, package_files
from rewards.opened import OpenedFiles
from rewards.protocol import RewardError
from rewards.reached_code import reached_source

Config = LearningConfig | MtpConfig


def sources_of(config: Config, opened: OpenedFiles) -> Sources:
    """What the result of a run depends on, but for its data and its model: these are compared with a checkpoint."""
    sources = [*_of_rewards(config), *_of_environments(config), *_of_agent(config), *_of_loss(config)]
    return Sources(sources, opened, [config.output_dir.absolute()])


def _of_rewards(config: Config) -> Iterator[Source]:
    for reward in [] if scores_nothing(config) else rewards_of(config):
        if reward.function.startswith(registry.MODEL):
            continue
        label = reward.name or reward.function.rpartition(":")[2]
        found = registry.find_reward(reward.function)
        if reward.function in registry.CALLABLES:
            yield _of_callable(reward, label)
        elif found.path:  # rewards.json has the digest of its own file
            yield Source(reward.function, found.path, None, _imports(found), label)
        else:
            yield Source(reward.function, reward=label)


def _of_callable(reward: RewardOptions, label: str) -> Source:
    """A function of this process; one that was typed into an interpreter has no file."""
    function = inspect.unwrap(registry.CALLABLES[reward.function])
    if not inspect.isfunction(function):
        function = type(function)
    try:
        path, own = inspect.getsourcefile(function), inspect.getsource(function).encode()
        content = Path(path or "").read_bytes()
    except (OSError, TypeError):
        return Source(reward.function, reward=label)
    found = registry.Source(reward.function, function.__qualname__, path, content)
    reached = reached_source(content, found.attribute)
    code = code_digest(own if reached is None else reached.encode())
    return Source(reward.function, path, code, _imports(found), label)


def _of_environments(config: Config) -> Iterator[Source]:
    spec = environment_of(config)
    if spec is None:
        return
    from rollout.environments.protocol import MCP, path_of

    label = _label(config, "environment")
    paths = [path_of(spec, name) for name, _ in spec.environments]
    together = ", ".join([*spec.tools, *paths])  # the name of their worker
    yield Source(together, reward=label)
    for function in [*spec.tools, *paths]:
        for source in _named(function, "environment", label):
            yield source
            if function != together:
                yield Source(together, source.path, None, (), label)
    for _, path in spec.environments:
        if path.startswith(MCP):
            yield Source(together, None, None, [*_scripts(path.removeprefix(MCP))], label)


def _of_agent(config: Config) -> Iterator[Source]:
    options = agent_of(config)
    if options is not None and options.agent:
        yield from _named(options.agent, "agent", _label(config, "agent"))


def _of_loss(config: Config) -> Iterator[Source]:
    if isinstance(config, TrainConfig):
        for function in filter(is_own, (config.loss.loss_type, config.loss.advantage)):
            yield from _named(function, "loss")


def _named(function: str, what: str, label: str | None = None) -> Iterator[Source]:
    with suppress(RewardError):  # a built-in environment has no file of the user
        found = registry.find_function(function, what)
        yield Source(function, found.path, found.code_sha256, _imports(found), label)


def _imports(found: registry.Source) -> list[Path]:
    path = Path(str(found.path))
    reached = reached_source(found.content, found.attribute)
    place = found.function.rpartition(":")[0].rpartition(":")[2]
    packages = [] if place.endswith(".py") else package_files(place)
    files = imported_files(path, found.content if reached is None else reached)
    return [file for file in dict.fromkeys([*packages, *files]) if file != path]


def _label(config: Config, built_in: str) -> str:
    """The reward that hands over the failures of the environment or of the agent."""
    return next((r.name or built_in for r in rewards_of(config) if r.function == built_in), built_in)


def _scripts(command: str) -> Iterator[Path]:
    """The files that the command of a server names, and what a Python script among them imports."""
    with suppress(ValueError):  # no command, but an address
        for path in map(Path, shlex.split(command)):
            if path.is_file() and not path.resolve().is_relative_to("/usr") and not path.samefile(sys.executable):
                yield path.absolute()
                if path.suffix == ".py":
                    yield from imported_files(path.absolute(), path.read_bytes())
