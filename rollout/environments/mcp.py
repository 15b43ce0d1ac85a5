"""Environments of MCP servers (optional extra `mcp`) in TRL's contract: the tools of the server are methods.

The official SDK speaks the protocol (PyPI `mcp` 2.3; modelcontextprotocol/python-sdk, src/mcp/client). An episode has a
session of its own, from its first call to its end: a process for a command, and for an address what the server makes of
it. What a tool answers with `isError` is told to the policy. If a server is dead, late or answers something else, the
episode has failed.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rewards.isolation.environments import OWN, EnvironmentFailed
from rewards.isolation.variables import worker_variables

if TYPE_CHECKING:
    from mcp import StdioServerParameters

LIST_TIMEOUT_S = 60.0  # for a server to start and to list its tools
KINDS = {-32000: "died", -32001: "timeout"}  # of failures, by the SDK's codes CONNECTION_CLOSED and REQUEST_TIMEOUT
INVALID_PARAMS = -32602  # of JSON-RPC
# The SDK starts a server in a session of its own, which would outlive a killed process. So it starts this in its place,
# which ends the whole session when the process that asked for it is gone.
_GUARD = """
import os, signal, subprocess, sys, threading, time
def watch(parent):
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, args=[int(sys.argv[1])], daemon=True).start()
sys.exit(subprocess.call(sys.argv[2:]))
"""


class Mcp:
    """One episode with the tools of a server. It gives no reward. `mcp` makes the classes."""

    _most = 64  # episodes that a process keeps; the server of a dropped one starts again, and its calls are repeated
    _server: str
    _timeout_s: float
    _session: _Session | None = None

    def reset(self, **columns: object) -> None:
        """Nothing happens before the first call, which begins the session."""

    def get_reward(self) -> None:
        """The episode has ended, and its session ends, too."""
        self._close()

    def _call(self, tool: str, arguments: dict[str, Any]) -> str:
        end = time.monotonic() + self._timeout_s
        self._session = self._session or _Session(self._server, self._timeout_s)
        return self._session.call(tool, arguments, max(0.0, end - time.monotonic()))

    def _close(self) -> None:
        if self._session is not None:  # nothing waits for a server that takes its time to end
            threading.Thread(target=self._session.close, daemon=True).start()
            self._session = None

    __del__ = _close


def mcp(server: str, timeout_s: float = 9.0) -> type[Mcp]:
    """The class of a server's environment: `environment: mcp:SERVER`. Its tools are asked for now.

    `server` is a command, by stdio, or the address of streamable HTTP. A call and the start of its session may take
    `timeout_s`. Raises ValueError without the package, if the server does not answer, or its tools cannot be methods.

    >>> Search = mcp("python search_server.py")  # doctest: +SKIP
    """
    methods = {}
    for name, description, schema in _tools_of(server):
        if name in OWN or name.startswith("_") or hasattr(Mcp, name):
            raise ValueError(
                f"MCP server {server!r}: an environment cannot have a tool called {name!r}; rename it there"
            )
        methods[name] = _method(name, {"name": name, "description": description, "parameters": schema})
    if not methods:
        raise ValueError(f"MCP server {server!r} lists no tools")
    return type("Mcp", (Mcp,), {"_server": server, "_timeout_s": timeout_s, **methods})


@functools.cache
def _tools_of(server: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The name, the description and the JSON schema of each tool. Raises ValueError."""
    try:
        with closing(_Session(server, LIST_TIMEOUT_S)) as session:
            tools = [(tool.name, tool.description or tool.name, tool.input_schema) for tool in session.tools()]
    except EnvironmentFailed as error:
        raise ValueError(str(error)) from error
    for name, _, schema in tools:
        parts = schema.setdefault("properties", {})
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError(f"MCP server {server!r}: the schema of tool {name!r} has properties that are no objects")
    return tools


def _method(name: str, schema: dict[str, Any]) -> Callable[..., str]:
    def call(self: Mcp, /, **arguments: object) -> str:
        return self._call(name, arguments)

    call.__name__, call.__doc__ = name, schema["description"]
    call.json_schema = schema  # type: ignore[attr-defined]  # in place of hints and a docstring
    return call


class _Session:
    """A connection to a server, for functions that are not async."""

    def __init__(self, server: str, timeout_s: float) -> None:
        try:
            from anyio.from_thread import start_blocking_portal
            from mcp import Client
        except ImportError as error:
            raise ValueError("an MCP server needs the package mcp: pip install 'quartet-rl[mcp]'") from error
        for name in ("client", "mcp"):  # the SDK's log repeats what the failure of an episode says
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.server, self._stack, self._statuses = server, ExitStack(), list[int]()
        is_address = server.startswith(("http://", "https://"))
        place: Any = _at_address(server, timeout_s, self._statuses) if is_address else _command(server)
        client: Any = Client(place, read_timeout_seconds=timeout_s)
        self._portal = self._stack.enter_context(start_blocking_portal())
        try:
            with self._failures("its first request"):
                self._client = self._stack.enter_context(self._portal.wrap_async_context_manager(client))
        except BaseException:
            self.close()
            raise

    def tools(self) -> Iterator[Any]:
        """All tools, page by page."""
        cursor = None
        while True:
            with self._failures("list of tools"):
                page = self._portal.call(functools.partial(self._client.list_tools, cursor=cursor))
            yield from page.tools
            cursor = page.next_cursor
            if cursor is None:
                return

    def call(self, tool: str, arguments: dict[str, Any], timeout_s: float) -> str:
        """The text of a tool's answer. Raises RuntimeError for what the policy is told, such as wrong arguments."""
        with self._failures(f"tool {tool!r}"):
            result = self._portal.call(self._client.call_tool, tool, arguments, timeout_s)
        text = "\n".join(map(_text, result.content))
        if not result.content and result.structured_content is not None:
            text = json.dumps(result.structured_content)
        if result.is_error:
            raise RuntimeError(text)
        return text

    def close(self) -> None:
        with suppress(Exception):  # all that was asked has been answered
            self._stack.close()

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Raises EnvironmentFailed, which names the server and what it was asked, or RuntimeError."""
        try:
            yield
        except Exception as error:
            while isinstance(error, ExceptionGroup):  # of a connection's tasks
                error = error.exceptions[0]
            code = getattr(error, "code", None)
            if code == INVALID_PARAMS:
                raise RuntimeError(str(error)) from None
            refused = [f"HTTP {status}: " for status in self._statuses[-1:] if status >= 400]
            about = f"MCP server {self.server!r}, {what}: {''.join(refused)}{error!s:.500}"
            raise EnvironmentFailed(KINDS.get(code or 0, "raised"), about) from error


@asynccontextmanager
async def _at_address(url: str, timeout_s: float, statuses: list[int]) -> AsyncIterator[Any]:
    """The SDK's transport, which does not tell with which statuses the server has answered: they go into `statuses`."""
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    async def note(response: httpx2.Response) -> None:
        statuses.append(response.status_code)

    limit_s = 2 * timeout_s  # the session's own comes first
    by_proxy = httpx2.URL(url).host not in ("127.0.0.1", "localhost", "::1")
    async with (
        httpx2.AsyncClient(timeout=limit_s, trust_env=by_proxy, event_hooks={"response": [note]}) as client,
        streamable_http_client(url, http_client=client) as streams,
    ):
        yield streams


def _command(server: str) -> StdioServerParameters:
    """The command as the SDK takes it. Raises ValueError for one that is not there."""
    from mcp import StdioServerParameters

    command = shlex.split(server)
    if not command or shutil.which(command[0]) is None:
        raise ValueError(
            f"MCP server {server!r}: there is no such command; name one, or an address that begins with http://"
        )
    arguments = ["-I", "-S", "-c", _GUARD, str(os.getpid()), *command]
    return StdioServerParameters(command=sys.executable, args=arguments, env=worker_variables())


def _text(block: Any) -> str:
    """The text of a part of an answer; a policy reads no other."""
    text = getattr(getattr(block, "resource", block), "text", None)
    return f"({block.type}, which is no text)" if text is None else text
