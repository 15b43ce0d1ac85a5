"""An external agent, as it runs in a worker process: a function that is called once for each episode.

It asks the policy by OpenAI's API, at a `base_url` of its episode's own. What it returns is a reward, or None.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from rewards.isolation.environments import Nothing
from rewards.protocol import RewardError, awaited
from rewards.registry import find_function, load_function

OWN = ("base_url", "api_key", "prompt")  # what an agent gets besides the columns of its example


class LoadedAgent:
    """Answers requests for episodes, see `call`. The function gets the arguments that it names; with `**kwargs` all."""

    def __init__(self, function: str) -> None:
        for name in ("NO_PROXY", "no_proxy"):  # the policy is on this machine
            os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1"])
        self.signature = Nothing()
        source = find_function(function, "agent")
        self.agent, self.path = load_function(source, "agent"), source.path
        with suppress(ImportError):  # numpy imports it late, and the first episode is seeded, too
            import_module("numpy.random")
        parameters = inspect.signature(self.agent).parameters
        self.takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.names = set(parameters)
        if not self.takes_all and "base_url" not in self.names:
            raise RewardError(f"agent {function!r} has no parameter `base_url`, where it finds the policy; add one")
        self._loop = asyncio.new_event_loop()  # one for all: a client may keep a connection that belongs to it

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The `reward` of an episode, or why the agent has failed: {"kind", "message"}.

        Keys of the request: `given` (arguments by name) and `seed`, of `random` and of numpy's random functions.
        """
        arguments = {name: value for name, value in request["given"].items() if self.takes_all or name in self.names}
        random.seed(request["seed"])
        if numpy := sys.modules.get("numpy.random"):
            numpy.seed(request["seed"] % 2**32)
        try:
            result = self.agent(**arguments)
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(awaited(result))
            if result is not None and not hasattr(result, "__float__"):
                return {"kind": "not_a_number", "message": f"returned {result!r:.80}; return a number or None"}
            return {"reward": None if result is None else float(result)}
        except KeyboardInterrupt:
            raise
        except MemoryError as error:
            return {"kind": "memory", "message": f"it needs more memory than its process may have ({error!s:.200})"}
        except BaseException as error:  # also SystemExit, since an agent must not end the worker
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.path]
            where = f" (line {frames[-1].lineno} in {frames[-1].name})" if frames else ""
            return {"kind": "raised", "message": f"{type(error).__name__}: {error!s:.2000}{where}"}
