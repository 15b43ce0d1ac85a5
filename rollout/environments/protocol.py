"""What an environment is, and how a policy's turns reach it.

The contract is TRL's (`environment_factory`, `tools`): a class without arguments, with one object for each rollout.

    class Guess:
        def reset(self, secret: int, **columns) -> str | None:    # gets the data's columns
            self.secret, self.score = secret, 0.0
            return "Guess a number from 1 to 9."                   # added to the last message of the prompt

        def guess(self, number: int) -> str:                       # every public method is a tool
            '''Guess the number.

            Args:
                number: The guess.
            '''
            self.score = float(number == self.secret)
            return "higher" if number < self.secret else "lower" if number > self.secret else "right"

        def get_reward(self) -> float:                             # optional
            return self.score

Methods may be async. What a tool raises is told to the policy as `{'error': '...'}`. Four things are ours. The random
numbers of `random` and numpy follow from the rollout's key: all rollouts of a group begin alike, and then each has its
own. An attribute `done` that is true ends the episode. A `get_reward` with a parameter `turns` gets the messages of
the episode. An episode may be made anew at any time, with the same calls, so an environment must not depend on a clock
or on what other episodes did.

A built-in environment has `pure = True` if its tools answer by their arguments alone. Demonstrations then have its
answers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.isolation.environments import OWN, load_class, load_function, methods_of
from rewards.isolation.pool import WorkerPool
from rollout.environments.format import Answers
from rollout.sampling import EnvironmentSpec, SamplingParams, row_key

COLUMN = "environment"  # of the data, where it chooses among several environments
BUILT_IN = {
    "calculator": "rollout.environments.calculator:Calculator",
    "python": "rollout.environments.python:Python",
    "word_game": "rewards.data.word_game:WordGame",
}
MCP = "mcp:"  # before the command or the address of an MCP server


def path_of(spec: EnvironmentSpec, name: str) -> str:
    """Gives the path of this environment's class.

    >>> path_of(EnvironmentSpec(environments=(("", "word_game"),)), "")
    'rewards.data.word_game:WordGame'
    """
    path = dict(spec.environments)[name]
    if path.startswith(MCP):  # a call ends before its process would be ended
        return f"rollout.environments.mcp:mcp({json.dumps(path.removeprefix(MCP))}, {0.9 * spec.timeout_s})"
    return BUILT_IN.get(path, path)


def chosen(spec: EnvironmentSpec, columns: Mapping[str, Any]) -> str:
    """The name of the environment of a prompt. Raises ValueError where its column names none."""
    names = [name for name, _ in spec.environments]
    if names in ([], [""]):
        return ""
    named = columns.get(COLUMN)
    if named not in names:
        raise ValueError(f"column {COLUMN!r} holds {named!r}; the environments are {', '.join(names)}")
    return str(named)


def columns_of(spec: EnvironmentSpec, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Gives `reset` its columns: all but the one that chooses. Raises ValueError for a value that JSON cannot hold."""
    several = [name for name, _ in spec.environments] not in ([], [""])
    sent = {name: value for name, value in columns.items() if not (several and name == COLUMN)}
    for name, value in sent.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {name!r} cannot be sent to an environment: {error}") from error
    return sent


def tools_of(spec: EnvironmentSpec, name: str) -> list[Callable[..., Any]]:
    """The tools of this environment, without `self`, for their schemas; they are never called.

    Raises RewardError or ValueError for what is no tool or no environment.
    """
    tools: list[Callable[..., Any]] = [load_function(tool, "tools") for tool in spec.tools]
    if spec.environments:
        path = path_of(spec, name)
        environment = load_class(path, "environment")
        if not callable(getattr(environment, "reset", None)):
            raise ValueError(f"environment {path!r} has no method `reset`, which is called for each rollout")
        tools += [
            method
            if isinstance(inspect.getattr_static(environment, name), staticmethod)
            else types.MethodType(method, object())
            for name, method in methods_of(environment).items()
        ]
        if not tools:
            raise ValueError(f"environment {path!r} has no tools: give it a public method besides {' and '.join(OWN)}")
    return tools


def answers_of(spec: EnvironmentSpec, name: str) -> Answers | None:
    """Gives what the tools of a built-in `pure` environment answer to a call: tool and arguments. None for any other.

    They are called in this process, so what they answer depends on the arguments alone. It raises what the tool raises.

    >>> answers_of(EnvironmentSpec(environments=(("", "calculator"),)), "")("calculate", {"expression": "48/2"})
    '24'
    """
    path = dict(spec.environments).get(name)
    environment = load_class(BUILT_IN[path], "environment") if path in BUILT_IN else None
    if environment is None or not getattr(environment, "pure", False):
        return None
    its = environment()
    return lambda tool, arguments: str(getattr(its, tool)(**arguments))


def open_workers(spec: EnvironmentSpec) -> WorkerPool:
    """The processes in which tools run. Raises RewardError if something cannot be loaded there, or not with so little
    memory."""
    environments = {name: path_of(spec, name) for name, _ in spec.environments}
    description = {
        "kind": "environments",
        "function": ", ".join([*spec.tools, *environments.values()]),
        "tools": list(spec.tools),
        "environments": environments,
    }
    memory = (spec.memory_mb or 0) << 20
    pool = WorkerPool([description], size=spec.workers, timeout_s=spec.timeout_s, memory=memory)
    pool.run([])
    return pool


def check(spec: EnvironmentSpec, columns: Mapping[str, Any]) -> None:
    """Begin an episode of a prompt with these columns. Raises ValueError or RewardError for what cannot begin."""
    for name, _ in spec.environments or (("", ""),):
        tools_of(spec, name)
    request = {"episode": "check", "environment": chosen(spec, columns), "columns": columns_of(spec, columns)}
    pool = open_workers(spec)
    try:
        turns = [{"role": "assistant", "content": ""}]
        begin = {"seeds": [0, 0], "history": [], "calls": [], "ends": True, "turns": turns}
        [reply] = run(pool, [request | begin])
    finally:
        pool.close()
    if "kind" in reply:
        raise ValueError(f"the environment cannot begin with the first example: {reply['kind']}: {reply['message']}")


def run(pool: WorkerPool, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The replies, see `LoadedEnvironments.call`.

    A worker that died may have been killed from outside, so its request is repeated once. One that does not hold the
    episode has a time limit for `reset`, and for each call that it repeats.
    """
    numbered = [request | {"function": 0, "limits": 2 + len(request["history"])} for request in requests]
    replies = pool.run(numbered)
    for i, reply in enumerate(replies):
        if reply is not None and reply.get("kind") == "died":
            [replies[i]] = pool.run([numbered[i]])
    return [reply for reply in replies if reply is not None]


def seeds(params: SamplingParams, prompt_id: str, sample: int) -> tuple[int, int]:
    """The seeds of a group and of a rollout, from their keys: seed, step, draw, prompt, and sample."""
    text = f"environment/{params.seed}/{params.step}/{params.draw}/{prompt_id}".encode()
    group = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    first, second = (word % 2**32 for word in row_key(params, prompt_id, sample))
    return group, first << 32 | second
