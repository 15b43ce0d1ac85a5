"""OpenAI's API for a policy, as an ASGI application, which uvicorn serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from grpo.endpoint.answers import Answer, event
from grpo.endpoint.api_error import ApiError
from grpo.endpoint.asked import Asked, ChatAsked, CompletionAsked
from grpo.endpoint.body import read
from grpo.endpoint.door import ENDS, HEADERS, Door
from grpo.endpoint.served import Job, Served
from rollout.request import News

BEARER = "Authorization: Bearer "


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as OpenAI's clients read it.

    >>> error_body(ApiError("max_tokens=0: use 1 or more", param="max_tokens"))
    {'error': {'message': 'max_tokens=0: use 1 or more', 'type': 'invalid_request_error', 'param': 'max_tokens',
     'code': None}}
    """
    kind = "rate_limit_error" if error.status == 429 else "server_error" if error.status >= 500 else None
    kind = kind or "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


class Rows:
    """One request has these rows. `news` gives their new tokens, in the event loop of the server."""

    def __init__(self, served: Served, jobs: Sequence[Job]) -> None:
        self.served, self.loop = served, asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, News] | None] = asyncio.Queue()
        self.requests = [job.request(self._tell) for job in jobs]
        served.batcher.submit(self.requests)

    def _tell(self, index: int, news: News) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, news))

    async def news(self) -> AsyncIterator[tuple[int, News]]:
        """News come until every row has ended. Raises ApiError where one can get no more, and ClientDisconnect where
        nobody waits for them."""
        ended = 0
        while ended < len(self.requests):
            item = await self.queue.get()
            if item is None:
                raise ClientDisconnect
            index, news = item
            if news.error is not None:
                raise ApiError(news.error, 503 if "has ended" in news.error else 500, code="decoding_failed")
            if news.completion is not None:
                ended += 1
                if news.completion.finish_reason == "abort":
                    raise ApiError("the policy's logits are not finite", 500, code="not_finite")
            yield index, news

    async def watch(self, request: Request) -> None:
        """Look whether the client, whose body was read, goes away."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait(None)

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
            last = event(error_body(ApiError(ENDS, 503)))
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self.rows.leave()

    @staticmethod
    async def _events(answer: Answer, rows: Rows) -> AsyncIterator[bytes]:
        try:
            async for index, news in rows.news():
                for chunk in answer.pieces(index, news):
                    yield event(chunk)
        except ApiError as error:
            yield event(error_body(error))
            return
        for chunk in answer.closing():
            yield event(chunk)
        yield event("[DONE]")


def questions(of: Callable[[Request], Served], door: Door, prefix: str = "") -> list[Route]:
    """Returns the routes of OpenAI's API under `prefix`; `of` finds what is asked."""

    def answering(kind: type[Asked]) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            served = of(request)

            def understand(body: bytes) -> Answer:
                asked = read(kind, body)
                return Answer(served, asked, served.jobs(asked))

            answer = await door.read(request, understand)
            rows = Rows(served, answer.jobs)
            if answer.asked.stream:
                return _Stream(answer, rows)
            try:
                return await _whole(request, answer, rows)
            finally:
                rows.leave()

        return respond

    async def models(request: Request) -> dict[str, Any]:
        served, name = of(request), request.path_params.get("name")
        if name not in (None, served.name):
            message = f"the model {name!r:.60} does not exist; here it is {served.name!r}"
            raise ApiError(message, 404, param="model", code="model_not_found")
        one = {
            "id": served.name,
            "object": "model",
            "created": 0,
            "owned_by": "quartet",
            "policy_version": served.batcher.engine.version,
            "meaning": served.meaning,
            "max_model_len": served.context,
            "accept": served.defaults.accept,
            "max_waiting": served.batcher.most_waiting,
            "chat_template_kwargs": getattr(served.tokenizer, "chat_template_kwargs", {}),
        }
        return {"object": "list", "data": [one]} if name is None else one

    return [
        door.route(f"{prefix}/v1/models", models),
        door.route(f"{prefix}/v1/models/{{name:path}}", models),
        door.route(f"{prefix}/v1/completions", answering(CompletionAsked), "POST"),
        door.route(f"{prefix}/v1/chat/completions", answering(ChatAsked), "POST"),
    ]


def app(served: Served, keys: Sequence[str] = (), *, starts: Callable[[], Awaitable[None]] | None = None) -> Starlette:
    """Returns the application of one policy. `starts` runs beside the server until it ends."""
    door = Door(error_body, BEARER, keys)

    def state() -> dict[str, Any]:
        alive, version = served.batcher.alive, served.batcher.engine.version
        return {"status": "ok" if alive else "the decoding thread has ended", "policy_version": version}

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(prometheus(served), 200, HEADERS, "text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        beside = asyncio.ensure_future(starts()) if starts else None
        yield
        if beside:
            beside.cancel()
        await asyncio.to_thread(served.batcher.close)

    routes = [*questions(lambda request: served, door), door.route("/metrics", metrics)]
    return door.application(routes, state, lifespan)


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
    watching = asyncio.ensure_future(rows.watch(request))
    try:
        async for index, news in rows.news():
            if news.completion is not None:
                answer.done[index] = news.completion
    finally:
        watching.cancel()
    return await asyncio.to_thread(lambda: JSONResponse(answer.whole(), headers=HEADERS))
