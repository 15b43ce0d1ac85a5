"""How a server is asked: who may, with which bodies, for how long, and in which form it refuses."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Lifespan

from grpo.endpoint.api_error import ApiError
from grpo.endpoint.hosts import host_of, is_loopback

MOST_BYTES, BODY_S = 1 << 22, 60.0  # of a body, and the seconds that it may take to arrive
LARGE, MOST_LARGE = 1 << 16, 1 << 24  # a body of more bytes is large; so many bytes of large ones may be here at once
JSON = "application/json"
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
ENDS = "the server ends, and the request had no more time; send it again"

Form = Callable[[ApiError], dict[str, Any]]
Asked = TypeVar("Asked")


class Door:
    """The way into one server. `form` is the body of its errors. With `keys` each request needs one of them after
    `header`, such as "X-API-Key: ". Without, only a request that names a host of the loopback is answered, so that no
    web page can ask by a name of its own. Bodies of more than LARGE bytes have `most_held` together."""

    def __init__(self, form: Form, header: str, keys: Sequence[str] = (), most_held: int = MOST_LARGE) -> None:
        self.form, self.header, self.keys, self.most_held = form, header, keys, most_held
        self.held = 0  # bytes of large bodies

    def route(
        self, path: str, act: Callable[[Request], Awaitable[object]], method: str = "GET", media: str = JSON
    ) -> Route:
        """Returns a route whose requests are refused or answered: a dict is JSON. `media` is of a body that is sent."""

        async def respond(request: Request) -> Response:
            request.state.key = self.admit_request(request.headers)
            sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if method == "POST" and sent != media:
                raise ApiError(f"send the request as Content-Type: {media}", 415)
            try:
                answer = await act(request)
            except asyncio.CancelledError:  # by the server, when its grace period ends
                raise ApiError(ENDS, 503) from None
            return answer if isinstance(answer, Response) else JSONResponse(answer, headers=HEADERS)

        return Route(path, respond, methods=[method])

    def admit_request(self, headers: Headers) -> str:
        """Returns the key that a request shows, or nothing if it needs none. Raises ApiError for strangers."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and not is_loopback(host_of(origin)) and host_of(origin) != host_of(host):
            raise ApiError(f"origin {origin!r:.60}: the pages of another host are not answered", 403)
        name, _, before = self.header.partition(": ")
        shown = headers.get(name, "").removeprefix(before).encode()
        for key in self.keys:
            if hmac.compare_digest(shown, key.encode()):
                return key
        if self.keys:
            raise ApiError(f"the key is missing or wrong; send {self.header}KEY", 401, code="invalid_api_key")
        if not is_loopback(host_of(host)):
            raise ApiError(f"host {host!r:.60}: without a key only localhost and 127.0.0.1 are answered", 403)
        return ""

    async def read(self, request: Request, understand: Callable[[bytes], Asked], most: int = MOST_BYTES) -> Asked:
        """Returns what `understand` makes of a body with at most `most` bytes, in a thread: others are answered
        meanwhile. A large body counts as held until then, so `understand` may keep it."""
        if int(request.headers.get("content-length", 0)) > most:
            raise _too_large(most)
        body, held = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_S) as limit:
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise _too_large(most)
                    if len(body) > LARGE:
                        self.held, held = self.held + len(body) - held, len(body)
                    if held and self.held > self.most_held:
                        message = "too many large bodies arrive at once; send this one again later"
                        raise ApiError(message, 429, code="rate_limit_exceeded", headers={"Retry-After": "1"})
                limit.reschedule(None)
                return await asyncio.to_thread(understand, bytes(body))
        except TimeoutError:
            if not limit.expired():
                raise
            raise ApiError(f"the body has not arrived within {BODY_S:g} s", 408) from None
        finally:
            self.held -= held

    def application(
        self, routes: Sequence[Route], state: Callable[[], dict[str, Any]], lifespan: Lifespan[Starlette] | None = None
    ) -> Starlette:
        """Returns the application with these routes and /health, which needs no key and shows the `state`."""

        async def health(_: Request) -> Response:
            return self.health(state())

        handlers: dict[Any, Any] = {ApiError: self._refused, HTTPException: self._not_here}
        handlers |= {ClientDisconnect: self._gone, Exception: self._broken}
        application = Starlette(
            routes=[*routes, Route("/health", health)], exception_handlers=handlers, lifespan=lifespan
        )
        application.router.redirect_slashes = False  # a redirection is no answer in the API's form
        application.state.door = self  # for connections, which refuse what never becomes a request
        return application

    def health(self, state: dict[str, Any]) -> Response:
        """The state of a server; 503 unless its status is "ok"."""
        return JSONResponse(state, 200 if state["status"] == "ok" else 503, HEADERS)

    def refusal(self, error: ApiError) -> Response:
        return JSONResponse(self.form(error), error.status, HEADERS | error.headers)

    async def _refused(self, _: Request, error: ApiError) -> Response:
        return self.refusal(error)

    async def _not_here(self, request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path:.200}: this server has no such part of the API"
        return self.refusal(ApiError(message, error.status_code))

    async def _gone(self, _: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def _broken(self, _: Request, error: Exception) -> Response:
        message = f"the server has a fault: {type(error).__name__}; its standard error has more"
        return self.refusal(ApiError(message, 500))


def _too_large(most: int) -> ApiError:
    return ApiError(f"the body has more than {most:,} bytes; shorten it", 413)
