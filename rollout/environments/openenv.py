"""Environments of OpenEnv servers (optional extra `openenv`) in TRL's contract: the tools of the server are methods."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from typing import Any

from rewards.isolation.environments import OWN


class OpenEnv:
    """One episode on a server. Its reward is the sum of the rewards of its steps. `openenv` makes the classes."""

    _url: str
    _client: Any = None
    done: bool = False  # whether the server has ended the episode; so no tool has this name

    def reset(self, **columns: object) -> None:
        """Begin an episode, with the data's columns. Its seed is drawn from `random`: it follows the rollout's key. A
        column `seed` of the data takes its place."""
        self._close()
        self._client = _client(self._url)
        self._client.connect()
        self._reward, self.done = 0.0, False
        self._note(self._client.reset(**{"seed": random.getrandbits(31)} | columns))

    def get_reward(self) -> float:
        """The sum of the rewards of all steps."""
        return self._reward

    def _call(self, tool: str, arguments: dict[str, Any]) -> str:
        from openenv.core.env_server.mcp_types import CallToolAction

        result = self._client.step(CallToolAction(tool_name=tool, arguments=arguments))
        self._note(result)
        observation = result.observation
        if error := getattr(observation, "error", None):
            raise RuntimeError(error.message)
        value = getattr(observation, "result", None)
        return str(value["data"] if isinstance(value, dict) and "data" in value else value)

    def _close(self) -> None:
        """The session ends, as a server has room for so many; nothing waits for one that takes its time."""
        if self._client is not None:
            threading.Thread(target=self._client.close, daemon=True).start()
            self._client = None

    __del__ = _close

    def _note(self, result: Any) -> None:
        self._reward += result.reward or 0.0
        self.done = bool(result.done)


def openenv(url: str) -> type[OpenEnv]:
    """The class of a server's environment, for `environment: my_environment.py:Maze`. Its tools are asked for now.

    The server must list its tools (`MCPEnvironment` of OpenEnv). For one with actions of its own, write a class in
    TRL's contract around its client. Raises ImportError without the package, and ValueError for a server without
    tools, or with one that cannot be a method. If the server does not answer, OpenEnv's client raises.

    >>> Maze = openenv("http://127.0.0.1:8000")
    """
    client = _client(url)
    try:
        client.connect()
        client.reset()
        tools = client.list_tools()
    finally:
        client.close()
    if not tools:
        raise ValueError(f"the OpenEnv server at {url} lists no tools; write a class around its client instead")
    for tool in tools:
        if tool.name in OWN or tool.name.startswith("_") or hasattr(OpenEnv, tool.name):
            raise ValueError(
                f"the OpenEnv server at {url}: an environment cannot have a tool called {tool.name!r}; rename it there"
            )
    return type("OpenEnv", (OpenEnv,), {"_url": url, **{tool.name: _method(tool) for tool in tools}})


def _client(url: str) -> Any:
    try:
        from openenv.core.mcp_client import MCPToolClient
    except ImportError as error:
        raise ImportError("an OpenEnv server needs the package openenv: pip install 'quartet-rl[openenv]'") from error
    return MCPToolClient(base_url=url).sync()


def _method(tool: Any) -> Callable[..., str]:
    """A method with the schema of the tool: hints and a signature have no union of types, and no name with a hyphen."""

    def call(self: OpenEnv, /, **arguments: object) -> str:
        return self._call(tool.name, arguments)

    schema = _schema(tool)
    call.__name__, call.__doc__ = tool.name, schema["description"]
    call.json_schema = schema  # type: ignore[attr-defined]
    return call


def _schema(tool: Any) -> dict[str, Any]:
    """The tool for chat templates. A server describes the arguments in their schemas or in the docstring."""
    about, _, described = (tool.description or tool.name).partition("Args:")
    properties = {}
    for name, given in tool.input_schema.get("properties", {}).items():
        part = {key: value for key, value in given.items() if key not in ("title", "default")}
        match = re.search(rf"^\s*{re.escape(name)}\b[^:\n]*:\s*(.+)", described, re.MULTILINE)
        properties[name] = part | {"description": part.get("description") or (match.group(1) if match else name)}
    required = tool.input_schema.get("required", [])
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    if "$defs" in tool.input_schema:  # types that several arguments name
        parameters["$defs"] = tool.input_schema["$defs"]
    return {"name": tool.name, "description": about.strip() or tool.name, "parameters": parameters}
