"""The server as an ASGI application, which uvicorn serves."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from grpo.endpoint.answers import Answer, event
from grpo.endpoint.api_error import ApiError
from grpo.endpoint.asked import Asked, ChatAsked, CompletionAsked, read
from grpo.endpoint.batcher import Full
from grpo.endpoint.served import Job, Served
from rollout.request import News

MOST_BYTES, BODY_S = 1 << 22, 30.0  # of a body, and the seconds that it may take to arrive
LARGE, MOST_LARGE = 1 << 16, 1 << 24  # a body of more bytes is large; so many bytes of large ones may be here at once
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
ENDS = "the server ends, and the request had no more time; send it again"


class Rows:
    """One request has these rows. `news` gives their new tokens, in the event loop of the server."""

    def __init__(self, served: Served, jobs: Sequence[Job]) -> None:
        self.served, self.loop = served, asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        self.requests = [job.request(self._tell) for job in jobs]
        try:
            served.batcher.submit(self.requests)
        except Full as full:
            message = f"too many requests wait (at most {served.batcher.most_waiting}); try again in {full.retry_s} s"
            headers = {"Retry-After": str(full.retry_s)}
            raise ApiError(message, 429, code="rate_limit_exceeded", headers=headers) from None

    def _tell(self, index: int, news: News) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, news))

    async def news(self) -> AsyncIterator[tuple[int, News]]:
        """News come until every row has ended. Raises ApiError where one can get no more."""
        ended = 0
        while ended < len(self.requests):
            index, news = await self.queue.get()
            if news.error is not None:
                raise ApiError(news.error, 503 if "has ended" in news.error else 500, code="decoding_failed")
            if news.completion is not None:
                ended += 1
                if news.completion.finish_reason == "abort":
                    raise ApiError("the policy's logits are not finite", 500, code="not_finite")
            yield index, news

    def leave(self) -> None:
        """Nobody reads the rest: the rows are free."""
        self.served.batcher.cancel(self.requests)


class _Stream(StreamingResponse):
    """The stream frees its rows however it ends."""

    def __init__(self, answer: Answer, rows: Rows) -> None:
        super().__init__(self._events(answer, rows), headers=HEADERS, media_type="text/event-stream")
        self.rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # by the server, when its grace period ends
            await send({"type": "http.response.body", "body": event(ApiError(ENDS, 503).body()), "more_body": False})
        finally:
            self.rows.leave()

    @staticmethod
    async def _events(answer: Answer, rows: Rows) -> AsyncIterator[bytes]:
        try:
            async for index, news in rows.news():
                for chunk in answer.pieces(index, news):
                    yield event(chunk)
        except ApiError as error:
            yield event(error.body())
            return
        for chunk in answer.closing():
            yield event(chunk)
        yield event("[DONE]")


def questions(of: Callable[[Request], Served], key: str | None, prefix: str = "") -> list[Route]:
    """Returns the routes of OpenAI's API under `prefix`; `of` says what is asked. With a `key` every question about
    models needs it as `Authorization: Bearer KEY`; without one only a request that names a loopback host is answered,
    so that no web page can ask by a name of its own."""
    bodies = Bodies()

    def answering(kind: type[Asked]) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            _refuse_strangers(request, key)
            served = of(request)
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError("send the request as Content-Type: application/json", 415)

            def understand(body: bytes) -> Answer:  # in a thread: meanwhile others are answered
                asked = read(kind, body)
                return Answer(served, asked, served.jobs(asked))

            async with bodies.of(request) as body:
                answer = await asyncio.to_thread(understand, body)
            rows = Rows(served, answer.jobs)
            if answer.asked.stream:
                return _Stream(answer, rows)
            try:
                return await _whole(request, answer, rows)
            finally:
                rows.leave()

        async def respond_in_time(request: Request) -> Response:
            try:
                return await respond(request)
            except asyncio.CancelledError:  # by the server, when its grace period ends
                raise ApiError(ENDS, 503) from None

        return respond_in_time

    def models(request: Request) -> Response:
        _refuse_strangers(request, key)
        served, name = of(request), request.path_params.get("name")
        if name not in (None, served.name):
            message = f"the model {name!r:.60} does not exist; here it is {served.name!r}"
            raise ApiError(message, 404, param="model", code="model_not_found")
        one = {"id": served.name, "object": "model", "created": 0, "owned_by": "quartet"}
        one |= {"policy_version": served.batcher.engine.version, "meaning": served.meaning}
        one |= {"max_model_len": served.context, "accept": served.defaults.accept}
        one |= {"max_waiting": served.batcher.most_waiting}
        one |= {"chat_template_kwargs": getattr(served.tokenizer, "chat_template_kwargs", {})}
        return JSONResponse({"object": "list", "data": [one]} if name is None else one, headers=HEADERS)

    return [
        Route(f"{prefix}/v1/models", models),
        Route(f"{prefix}/v1/models/{{name:path}}", models),
        Route(f"{prefix}/v1/completions", answering(CompletionAsked), methods=["POST"]),
        Route(f"{prefix}/v1/chat/completions", answering(ChatAsked), methods=["POST"]),
    ]


def app(served: Served, key: str | None = None, *, starts: Callable[[], Awaitable[None]] | None = None) -> Starlette:
    """Returns the application of one policy, see `questions`. `starts` runs beside the server until it ends."""

    def health(request: Request) -> Response:
        alive, version = served.batcher.alive, served.batcher.engine.version
        state = {"status": "ok" if alive else "the decoding thread has ended", "policy_version": version}
        return JSONResponse(state, 200 if alive else 503, HEADERS)

    def metrics(request: Request) -> Response:
        _refuse_strangers(request, key)
        return PlainTextResponse(prometheus(served), 200, HEADERS, "text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        beside = asyncio.ensure_future(starts()) if starts else None
        yield
        if beside:
            beside.cancel()
        await asyncio.to_thread(served.batcher.close)

    routes = [*questions(lambda request: served, key), Route("/health", health), Route("/metrics", metrics)]
    application = Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan)
    application.router.redirect_slashes = False  # a redirection is no answer in OpenAI's form
    return application


def prometheus(served: Served) -> str:
    """The text form of Prometheus has what was counted."""
    lines = []
    values = served.batcher.metrics() | {"policy_version": served.batcher.engine.version}
    for name, value in values.items():
        kind = "gauge" if name in ("rows", "waiting", "max_rows", "policy_version") else "counter"
        lines += [f"# TYPE quartet_{name} {kind}", f'quartet_{name}{{accept="{served.defaults.accept}"}} {value}']
    return "\n".join(lines) + "\n"


async def _whole(request: Request, answer: Answer, rows: Rows) -> Response:
    """The answer comes in one piece. The rows are given up where the client goes away before."""

    async def collect() -> None:
        async for index, news in rows.news():
            if news.completion is not None:
                answer.done[index] = news.completion

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
    return await asyncio.to_thread(lambda: JSONResponse(answer.whole(), headers=HEADERS))


class Bodies:
    """Reads the bodies of requests, and bounds what large ones hold together."""

    def __init__(self) -> None:
        self.held = 0  # bytes of large bodies

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """A body counts until the context ends."""
        held = 0
        try:
            body = bytearray()
            try:
                async with asyncio.timeout(BODY_S):
                    async for part in request.stream():
                        body += part
                        if len(body) > MOST_BYTES:
                            raise ApiError(f"the body has more than {MOST_BYTES:,} bytes; shorten it", 413)
                        if len(body) > LARGE:
                            self.held, held = self.held + len(body) - held, len(body)
                        if held and self.held > MOST_LARGE:
                            message = "too many large bodies arrive at once; send this one again later"
                            raise ApiError(message, 429, code="rate_limit_exceeded", headers={"Retry-After": "1"})
            except TimeoutError:
                raise ApiError(f"the body has not arrived within {BODY_S:g} s", 408) from None
            yield bytes(body)
        finally:
            self.held -= held


def _refuse_strangers(request: Request, key: str | None) -> None:
    if key is not None:
        answer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(answer.encode(), key.encode()):
            whose = "the key of --api_key_file, or the api_key that an agent was given"
            message = f"the key is missing or wrong; send Authorization: Bearer KEY, with {whose}"
            raise ApiError(message, 401, code="invalid_api_key")
        return
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if not is_loopback_host(name):
        raise ApiError(f"host {host!r:.60}: without a key only {LOOPBACK[0]} and {LOOPBACK[1]} are answered", 403)


def is_loopback_host(name: str) -> bool:
    """Whether a request to this host has been sent to this machine: an address of it, or its own name."""
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower() in LOOPBACK


async def _refused(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, HEADERS | error.headers)


async def _not_found(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    return JSONResponse(ApiError(message, error.status_code).body(), error.status_code, HEADERS)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _broken(_: Request, error: Exception) -> Response:
    message = f"the server has a fault: {type(error).__name__}; its standard error has more"
    return JSONResponse(ApiError(message, 500).body(), 500, HEADERS)


HANDLERS: dict[Any, Any] = {ApiError: _refused, HTTPException: _not_found, ClientDisconnect: _gone, Exception: _broken}
