"""Environments and tools, as they run in a worker process.

An environment is a class in TRL's contract, with one object for each episode. A request brings all that has happened in
its episode: whichever worker gets it makes the environment anew and repeats the calls, unless it still holds the object
at that place. So a worker may be killed and replaced at any time.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rewards.protocol import awaited
from rewards.registry import load_class as load_class
from rewards.registry import load_function as load_function

KEPT = 4096  # objects that a worker keeps; an episode whose object was dropped is repeated
OWN = ("reset", "get_reward")  # methods that are no tools
MOST_CHARACTERS = 1_000_000  # that a tool or `reset` may write; no context holds more


class EnvironmentFailed(Exception):
    """A tool cannot go on, so that its episode has failed: `kind` is timeout, died or raised. Nothing is told to the
    policy, unlike of any other exception of a tool."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Nothing:
    """The signature of what has none."""


def methods_of(environment: type) -> dict[str, Callable[..., Any]]:
    """The methods of the class that are tools, by name, as TRL finds them: functions that are public and not `OWN`."""
    members = inspect.getmembers(environment, predicate=inspect.isfunction)
    return {name: function for name, function in members if name not in OWN and not name.startswith("_")}


class LoadedEnvironments:
    """Answers requests for episodes, see `call`. `environments` are classes by name, `tools` functions beside them."""

    def __init__(self, function: str, tools: list[str], environments: Mapping[str, str]):
        self.signature = Nothing()
        self.tools = {tool.__name__: tool for tool in (load_function(tool, "tools") for tool in tools)}
        self.classes = {name: load_class(path, "environment") for name, path in environments.items()}
        with suppress(ImportError):  # numpy imports it late, and the first episode has a place in its stream, too
            import_module("numpy.random")
        self._loop = asyncio.new_event_loop()  # one for all: a client may keep a connection that belongs to it
        self._episodes: OrderedDict[str, _Episode] = OrderedDict()
        self._most = min([KEPT, *(getattr(kind, "_most", KEPT) for kind in self.classes.values())])

    def call(self, request: dict) -> dict:
        """Answers the calls of one turn, or says why the environment cannot go on: {"kind", "message"}.

        Keys of the request: `episode` (a name), `environment` (a key of `environments`), `columns`, `seeds` (of the
        group and of the rollout), `history` and `calls` ([[tool, arguments], ...]), and `ends`, which asks for the
        reward and brings `turns`, the messages of the episode. `renew` begins the time limit anew. The reply has
        `observation` (what `reset` gave), `results` [[text, whether the tool raised], ...], `done`, and `reward`.

        If memory runs out, all objects are dropped, and the episode is repeated alone: only what it needs itself is its
        failure.
        """
        try:
            return self._reply(request)
        except MemoryError:
            self._episodes.clear()
        try:
            return self._reply(request)
        except MemoryError as error:
            return {"kind": "memory", "message": f"it needs more memory than its process may have ({error!s:.200})"}

    def _reply(self, request: dict) -> dict:
        name, history = request["episode"], request["history"]
        episode = self._episodes.pop(name, None)
        try:
            if episode is None or not episode.is_at(request):
                renew = request.get("renew", lambda: None)
                episode = _Episode(self, request)
                renew()
                for tool, arguments in history:
                    episode.call(tool, arguments)
                    renew()
            results = [episode.call(tool, arguments) for tool, arguments in request["calls"]]
            reply = {"observation": episode.observation, "results": results, "done": episode.done}
            if request["ends"]:
                return reply | {"reward": episode.reward(request.get("turns", []))}
        except (KeyboardInterrupt, MemoryError):
            raise
        except EnvironmentFailed as error:
            return {"kind": error.kind, "message": str(error)}
        except BaseException as error:  # also SystemExit, since an environment must not end the worker
            return {"kind": "raised", "message": f"{type(error).__name__}: {error!s:.2000}"}
        self._episodes[name] = episode
        if len(self._episodes) > self._most:
            self._episodes.popitem(last=False)
        return reply

    def wait(self, result: object) -> Any:
        """The result, also of an async function."""
        return self._loop.run_until_complete(awaited(result)) if inspect.isawaitable(result) else result


class _Episode:
    """The environment of one rollout, and its place in the streams of `random` and numpy."""

    def __init__(self, loaded: LoadedEnvironments, request: dict):
        self.loaded, self.request, self.history = loaded, request, list[list[Any]]()
        self.tools = dict(loaded.tools)
        self.environment: Any = None
        self.observation: str | None = None
        self._seed(request["seeds"][0])
        if loaded.classes:
            with self._randomness():
                self.environment = loaded.classes[request["environment"]]()
                self.tools |= {name: getattr(self.environment, name) for name in methods_of(type(self.environment))}
                self.observation = self._reset(request["columns"])
        self._seed(request["seeds"][1])  # a group begins alike; what follows is each rollout's own

    def is_at(self, request: dict) -> bool:
        """It is the environment that this request is about, after the same calls."""
        made_from = ("environment", "columns", "seeds")
        return self.history == request["history"] and all(self.request[k] == request[k] for k in made_from)

    def _reset(self, columns: dict[str, Any]) -> str | None:
        """Calls `reset` with all columns, or those that it names where it has no `**kwargs`."""
        reset = self.environment.reset
        parameters = inspect.signature(reset).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            columns = {name: value for name, value in columns.items() if name in parameters}
        observation = self.loaded.wait(reset(**columns))
        if observation is not None and not isinstance(observation, str):
            raise TypeError(f"reset returned a {type(observation).__name__}; return a text or None")
        return observation and _short(observation, "reset")

    def call(self, tool: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """The text of the result, and whether the tool raised; then the text says what, as with TRL."""
        self.history.append([tool, copy.deepcopy(arguments)])  # a tool may change its own
        with self._randomness():
            try:
                return _short(str(self.loaded.wait(self.tools[tool](**arguments))), tool), False
            except (KeyboardInterrupt, MemoryError, EnvironmentFailed):
                raise
            except BaseException as error:
                return str({"error": f"{error!s:.2000}"}), True

    @property
    def done(self) -> bool:
        """The environment has ended the episode: it has an attribute `done` that is true."""
        done = getattr(self.environment, "done", False)
        return not callable(done) and bool(done)

    def reward(self, turns: list[dict[str, Any]]) -> float | None:
        """Asks `get_reward` for the reward, with `turns` where it has a parameter of that name."""
        get_reward = getattr(self.environment, "get_reward", None)
        if get_reward is None:
            return None
        arguments = {"turns": turns} if "turns" in inspect.signature(get_reward).parameters else {}
        with self._randomness():
            reward = self.loaded.wait(get_reward(**arguments))
        return None if reward is None else float(reward)

    def _seed(self, seed: int) -> None:
        self.seed, self._random, self._numpy = seed, random.Random(seed).getstate(), None

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """Lets `random` and numpy's legacy functions go on where this episode has left them."""
        random.setstate(self._random)
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            numpy.set_state(self._numpy or numpy.RandomState(self.seed % 2**32).get_state())
        try:
            yield
        finally:
            self._random = random.getstate()
            if numpy is not None:
                self._numpy = numpy.get_state()


def _short(text: str, name: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} wrote {len(text):,} characters; it may write {MOST_CHARACTERS:,}")
    return text.encode(errors="replace").decode()  # half a character is in no token
