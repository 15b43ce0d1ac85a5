"""How uvicorn listens: connections that only wait are closed, and there are fewer of them than files to open."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from grpo.endpoint.api_error import ApiError

HEAD_S = 10.0  # seconds that the head of a request may take
UNREAD_S = 30.0  # seconds that a client may leave what it was sent unread, once 64 KiB of it wait here
MOST_CONNECTIONS, MOST_ACCEPTED = 512, 128  # open, and accepted at once


class Connection(H11Protocol):
    """A new connection takes the place of the one that has waited longest without a request."""

    limit: asyncio.TimerHandle | None = None  # of the head
    unread: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """It waits while no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.since = self.loop.time()
        self.limit = self.loop.call_later(HEAD_S, self._late)
        others = [other for other in self.connections if other is not self and not other.transport.is_closing()]
        if len(others) >= most_connections()[0]:
            if idle := [other for other in others if isinstance(other, Connection) and other.waits]:
                min(idle, key=lambda other: other.since).transport.abort()
            else:
                self._refuse("too many connections are open; try again later", 503)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.waits:
            self.since = self.loop.time()
            self._cancel("limit")
        elif self.limit is None:
            self.limit = self.loop.call_later(HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel("limit", "unread")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("unread")

    def send_400_response(self, msg: str) -> None:
        if self.waits or not self.cycle.response_started:
            self._refuse(f"this is no request that HTTP/1.1 knows ({msg.lower().rstrip('.')})", 400)
        else:
            self.transport.close()

    def _cancel(self, *timers: str) -> None:
        for name in timers:
            if (timer := getattr(self, name)) is not None:
                timer.cancel()
                setattr(self, name, None)

    def _late(self) -> None:
        if self.conn.trailing_data[0]:  # a part of a head
            self._refuse(f"the head of a request has not arrived within {HEAD_S:g} s", 408)
        else:
            self.transport.close()

    def _refuse(self, message: str, status: int) -> None:
        application: Any = self.config.app
        body = json.dumps(application.state.door.form(ApiError(message, status))).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self.transport.close()


def most_connections() -> tuple[int, int]:
    """Returns how many connections may be open, and how many may be accepted at once. Where no file is left for one,
    asyncio writes a traceback, and that thousands of times in a second."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            return min(MOST_CONNECTIONS, files // 3), min(MOST_ACCEPTED, files // 10)
    return MOST_CONNECTIONS, MOST_ACCEPTED


def settings(application: Starlette, **more: object) -> uvicorn.Config:
    """Every server of ours has, besides its `own` settings, a quiet log, and nothing but HTTP/1.1."""
    common: dict[str, Any] = {"log_level": "error", "http": Connection, "ws": "none", "server_header": False}
    return uvicorn.Config(application, backlog=max(1, most_connections()[1]), **common | more)
