"""Talks to the server in `inside/quartet_server.py`. Whatever goes wrong is a RolloutError with the way out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from rollout.faults import RolloutError

CONNECT_S = 10.0
ANSWER_S = 60.0  # for what needs no computation; another trainer may be served before
POLL_S = 0.2  # how often a waiting client checks whether it should go on waiting
LONGEST = 1000  # characters of an error of vLLM's
PROTOCOL = 4


class Lost(RolloutError):
    """The server is unreachable, has died or has stopped answering. `how` says which, in a few words."""

    how = "it has not started"


class NotOurs(Lost):
    """Something else listens there."""


class Client:
    """One server at `url`. `while_waiting` is called several times a second; an exception that it raises ends the wait.

    `why` adds what is known about a server that is lost, such as the end of its log.
    """

    def __init__(
        self,
        url: str,
        token: str,
        while_waiting: Callable[[], None] = lambda: None,
        why: Callable[[], str] = lambda: "",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"rollout.vllm.url={url!r}: expected http://HOST:PORT")
        self.url, self.host, self.port = url, parts.hostname, parts.port or 80
        self.token, self.while_waiting, self.why = token, while_waiting, why

    def state(self) -> dict[str, Any]:
        """Asks the server about itself: `vllm`, its version, `tried`, `on_cpu`, and the `load` that it holds."""
        try:
            [state] = self._ask("GET", "/state", (), 0, ANSWER_S)
        except NotOurs:
            self._refuse_plain()
            raise
        if state.get("protocol") != PROTOCOL:
            raise RolloutError(
                f"vLLM at {self.url} speaks protocol {state.get('protocol')}, and this quartet {PROTOCOL}: start it "
                "with the quartet_server.py of this version"
            )
        return state

    def _refuse_plain(self) -> None:
        answer: dict[str, Any] = {}
        with suppress(RolloutError):
            [answer] = self._ask("GET", "/version", (), 0, ANSWER_S)
        if "version" in answer:
            raise RolloutError(
                f"rollout.vllm.url={self.url} is a plain `vllm serve` (vLLM {answer['version']}). It cannot confirm "
                "the digests of the weights that it has taken, takes them in its development mode alone and then from "
                "whoever reaches its port, and its batches depend on the clock. Start inside/quartet_server.py with "
                "the same interpreter in its place (docs/guides/vllm.md), or leave the url out"
            )

    def post(self, path: str, what: dict[str, Any], *, limit_s: float) -> Iterator[dict[str, Any]]:
        """The lines of the answer as they come; between two of them at most `limit_s` may pass."""
        body = json.dumps(what).encode()
        return self._ask("POST", path, (body,), len(body), limit_s)

    def upload(
        self, path: str, header: dict[str, Any], parts: Iterable[memoryview], size: int, *, limit_s: float
    ) -> dict[str, Any]:
        line = json.dumps(header | {"bytes": size}).encode() + b"\n"

        def body() -> Iterator[bytes | memoryview]:
            yield line
            yield from parts

        [answer] = self._ask("POST", path, body(), len(line) + size, limit_s)
        return answer

    def _ask(
        self, method: str, path: str, body: Iterable[bytes | memoryview], size: int, limit_s: float
    ) -> Iterator[dict[str, Any]]:
        """A thread talks, so that this one can look up from its waiting."""
        answers: SimpleQueue[dict[str, Any] | Exception | None] = SimpleQueue()
        connection = HTTPConnection(self.host, self.port, timeout=CONNECT_S)

        def talk() -> None:
            try:
                for answer in self._talk(connection, method, path, body, size, limit_s):
                    answers.put(answer)
                answers.put(None)
            except Exception as error:
                answers.put(error)

        Thread(target=talk, daemon=True, name=f"vllm {path}").start()
        deadline = time.monotonic() + CONNECT_S + limit_s
        try:
            while True:
                try:
                    answer = answers.get(timeout=POLL_S)
                except Empty:
                    self.while_waiting()
                    if time.monotonic() > deadline:
                        raise self._lost(f"has not answered {path} for {limit_s:g} s") from None
                    continue
                if answer is None:
                    return
                if isinstance(answer, Exception):
                    raise self._explained(answer, path, limit_s) from answer
                yield answer
                deadline = time.monotonic() + limit_s
        finally:
            if connection.sock is not None:  # also ends a thread that still waits
                with suppress(OSError):
                    connection.sock.shutdown(SHUT_RDWR)

    def _talk(
        self, connection: HTTPConnection, method: str, path: str, body: Iterable, size: int, limit_s: float
    ) -> Iterator[dict[str, Any]]:
        connection.connect()
        connection.sock.settimeout(limit_s)
        connection.putrequest(method, path)
        connection.putheader("Authorization", f"Bearer {self.token}")
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        with suppress(ConnectionError):  # it has refused before it has read all: its answer says why
            for part in body:
                connection.send(part)
        response = connection.getresponse()
        lines = [line for line in [response.read()] if line] if response.status != 200 else response
        if response.status in (401, 403):
            raise RolloutError(
                f"vLLM at {self.url} refuses our token; it is read from the environment variable QUARTET_VLLM_TOKEN, "
                "and must be the one that the server was started with"
            )
        answer: dict[str, Any] = {"ended": 0}
        for line in lines:
            answer = json.loads(line)
            if not isinstance(answer, dict):
                raise ValueError(f"it answers {line[:80]!r}")
            if "error" in answer:
                why = str(answer["error"])  # it can name every model that vLLM knows
                why = why if len(why) <= LONGEST else f"{why[: LONGEST // 2]} ... {why[-LONGEST // 2 :]}"
                raise RolloutError(f"vLLM at {self.url} cannot answer {path}: {why}")
            if response.status != 200:
                raise ValueError(f"it answers {path} with status {response.status}")
            yield answer
        if "ended" in answer:  # how far it is, and not what was asked for
            raise ConnectionError("it closed the connection before its answer was whole")

    def _explained(self, error: Exception, path: str, limit_s: float) -> RolloutError:
        if isinstance(error, RolloutError):
            return error
        if isinstance(error, TimeoutError):
            return self._lost(f"has not answered {path} for {limit_s:g} s")
        if isinstance(error, ValueError | HTTPException) and not isinstance(error, ConnectionError):
            return self._lost(f"is no server of ours, or another version of it: {error}", NotOurs)
        return self._lost(f"is lost at {path} ({type(error).__name__}: {error})")

    def _lost(self, what: str, kind: type[Lost] = Lost) -> Lost:
        lost = kind(f"vLLM at {self.url} {what}. {self.why()}")
        lost.how = f"it {what}"
        return lost
