"""Tinker's API as an ASGI application: what its SDK sends is understood by the SDK's own types."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types

from grpo.endpoint.app import HEADERS, LOOPBACK, is_loopback_host
from grpo.tinker import sampler, wire
from grpo.tinker.service import Job, Service, Unknown, check_number
from grpo.tinker.wire import Refused

MOST_BYTES, BODY_S = 1 << 26, 120.0  # of a body, and the seconds that it may take to arrive
WAIT_S = 20.0  # that a question for a result is held open
CONFIG = {  # by which the SDK is told what this server has
    "pjwt_auth_enabled": False,
    "use_pyqwest_transport": False,  # HTTP/1.1, without a proxy
    "proto_compress_fwdbwd": False,
    "custom_loss_server_side": False,
    "sample_max_concurrent_requests": 128,
    "sample_enable_stuck_detection": False,  # a laptop is slow
}


class ApiRefusal(Exception):
    """A request that gets no future."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def app(service: Service, key: str | None = None) -> Starlette:
    """Returns the application. With a `key` every request needs it as X-API-Key; without one any key will do, and only
    a request that names a loopback host is answered."""
    api = _Api(service, key)
    posts = {
        "client/config": api.client_config,
        "client/dynamic_config": api.dynamic_config,
        "create_session": api.create_session,
        "session_heartbeat": api.heartbeat,
        "sessions/{session}/finish": api.finish,
        "telemetry": api.telemetry,
        "create_model": api.create_model,
        "load_weights": api.load_weights,
        "get_info": api.get_info,
        "forward_backward": api.forward_backward,
        "optim_step": api.optim_step,
        "save_weights": api.save_weights,
        "save_weights_for_sampler": api.save_weights_for_sampler,
        "create_sampling_session": api.create_sampling_session,
        "asample": api.sample,
        "retrieve_future": api.retrieve_future,
        "weights_info": api.weights_info,
    }
    gets = {
        "healthz": api.health,
        "get_server_capabilities": api.capabilities,
        "samplers/{sampler}": api.get_sampler,
        "training_runs": api.training_runs,
        "training_runs/{run}": api.training_run,
        "training_runs/{run}/checkpoints": api.checkpoints,
    }
    routes = [Route(f"/api/v1/{path}", api.answering(act), methods=["POST"]) for path, act in posts.items()]
    routes += [Route(f"/api/v1/{path}", api.answering(act)) for path, act in gets.items()]
    delete = "/api/v1/training_runs/{run}/checkpoints/{place:path}"
    routes.append(Route(delete, api.answering(api.delete_checkpoint), methods=["DELETE"]))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    application = Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan)
    application.router.redirect_slashes = False
    return application


class _Path(BaseModel):
    tinker_path: str


class _Api:
    def __init__(self, service: Service, key: str | None) -> None:
        self.service, self.key = service, key

    def answering(self, act: Callable[[Request, bytes], Awaitable[object]]) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            self._refuse_strangers(request)
            try:
                answer = await act(request, await _body(request))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                place = ".".join(map(str, first["loc"]))
                raise ApiRefusal(422, f"{place}: {first['msg']}" if place else first["msg"]) from None
            except Refused as error:
                raise ApiRefusal(400, str(error)) from None
            except Unknown as error:
                raise ApiRefusal(404, str(error)) from None
            if isinstance(answer, Job):
                answer = {"request_id": answer.request_id}
            return answer if isinstance(answer, Response) else JSONResponse(answer, headers=HEADERS)

        return respond

    def _refuse_strangers(self, request: Request) -> None:
        if self.key is not None:
            if not hmac.compare_digest(request.headers.get("x-api-key", "").encode(), self.key.encode()):
                raise ApiRefusal(401, "the key is missing or wrong: set TINKER_API_KEY to that of --api_key_file")
            return
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not is_loopback_host(name):
            raise ApiRefusal(403, f"host {host!r:.60}: without a key only {LOOPBACK[0]} and {LOOPBACK[1]} are answered")

    # ---- clients and sessions ------------------------------------------------------------------------------------

    async def health(self, request: Request, body: bytes) -> dict[str, str]:
        return {"status": "ok"}

    async def client_config(self, request: Request, body: bytes) -> dict[str, Any]:
        return CONFIG

    async def dynamic_config(self, request: Request, body: bytes) -> dict[str, int]:
        return {"refresh_interval_sec": 3600}

    async def telemetry(self, request: Request, body: bytes) -> dict[str, str]:
        return {"status": "accepted"}  # and not looked at

    async def capabilities(self, request: Request, body: bytes) -> dict[str, Any]:
        context = self.service.base.max_length
        model = {"model_name": self.service.name, "max_context_length": context, "trainable": True, "sampleable": True}
        return {"supported_models": [model]}

    async def create_session(self, request: Request, body: bytes) -> dict[str, str]:
        asked = wire.understood(types.CreateSessionRequest, body)
        content = {"tags": asked.tags, "user_metadata": asked.user_metadata}
        return {"session_id": await asyncio.to_thread(self.service.create_session, content)}

    async def heartbeat(self, request: Request, body: bytes) -> dict[str, str]:
        self.service.session(wire.understood(types.SessionHeartbeatRequest, body).session_id)
        return {"type": "session_heartbeat"}

    async def finish(self, request: Request, body: bytes) -> dict[str, str]:
        self.service.session(request.path_params["session"])
        return {}

    # ---- training ------------------------------------------------------------------------------------------------

    async def create_model(self, request: Request, body: bytes) -> Job:
        asked = wire.understood(types.CreateModelRequest, body)
        return await self._ask(self._id(asked.session_id, asked.model_seq_id), 0, "create_model", asked)

    async def load_weights(self, request: Request, body: bytes) -> Job:
        asked = wire.understood(types.LoadWeightsRequest, body)
        if asked.session_id is not None:
            return await self._ask(self._id(asked.session_id, asked.model_seq_id or 0), 0, "load_weights", asked)
        return await self._ask_later(asked, "load_weights")

    async def forward_backward(self, request: Request, body: bytes) -> Job:
        asked = await asyncio.to_thread(wire.message_of, body)  # data that are wrong are the result's to say
        if asked.seq_id < 1:
            raise Refused(f"seq_id={asked.seq_id}: number the requests of a model from 1 on")
        return await asyncio.to_thread(self.service.ask, asked.model_id, asked.seq_id, "forward_backward", body)

    async def optim_step(self, request: Request, body: bytes) -> Job:
        return await self._ask_later(wire.understood(types.OptimStepRequest, body), "optim_step")

    async def save_weights(self, request: Request, body: bytes) -> Job:
        return await self._ask_later(wire.understood(types.SaveWeightsRequest, body), "save_weights")

    async def save_weights_for_sampler(self, request: Request, body: bytes) -> Job:
        asked = wire.understood(types.SaveWeightsForSamplerRequest, body)
        return await self._ask_later(asked, "save_weights_for_sampler")

    def _id(self, session: str, number: int) -> str:
        self.service.session(session)
        check_number("model_seq_id", number)
        return f"{session}:train:{number}"

    async def _ask_later(self, asked: Any, kind: str) -> Job:
        if asked.seq_id is None or asked.seq_id < 1:
            raise Refused(f"seq_id={asked.seq_id}: number the requests of a model from 1 on")
        return await self._ask(asked.model_id, asked.seq_id, kind, asked)

    async def _ask(self, model_id: str, number: int, kind: str, asked: BaseModel) -> Job:
        body = asked.model_dump_json(exclude_none=True).encode()
        return await asyncio.to_thread(self.service.ask, model_id, number, kind, body)

    async def get_info(self, request: Request, body: bytes) -> dict[str, Any]:
        asked = wire.understood(types.GetInfoRequest, body)
        model = self.service.model(asked.model_id)
        rank = model.spec.rank if model.spec else 0
        name = self.service.name
        data = {"arch": self.service.base.config.model_type, "model_name": name, "tokenizer_id": name}
        return {"type": "get_info", "model_id": model.id, "model_name": name, "model_data": data} | _lora(rank)

    # ---- sampling ------------------------------------------------------------------------------------------------

    async def create_sampling_session(self, request: Request, body: bytes) -> dict[str, str]:
        asked = wire.understood(types.CreateSamplingSessionRequest, body)
        if asked.model_path is None and asked.base_model != self.service.name:
            raise Refused(f"base_model={asked.base_model!r:.80}: this server has {self.service.name!r}")
        add, number = self.service.add_sampler, asked.sampling_session_seq_id
        return {"sampling_session_id": await asyncio.to_thread(add, asked.session_id, number, asked.model_path)}

    async def sample(self, request: Request, body: bytes) -> dict[str, Any]:
        asked = wire.understood(types.SampleRequest, body)
        if asked.sampling_session_id is None:
            raise Refused("sampling_session_id: create a sampling session first")
        sampler.read(asked.model_dump(exclude_none=True), "", ())  # its bounds, before anything is kept or allocated
        kept = asked.model_dump_json(exclude_none=True).encode()
        job = await asyncio.to_thread(self.service.ask_sampler, asked.sampling_session_id, asked.seq_id, kept)
        names = [f"{job.request_id}:{sample}" for sample in range(asked.num_samples)]
        return {"request_id": job.request_id, "sample_sequence_ids": names}

    async def get_sampler(self, request: Request, body: bytes) -> dict[str, Any]:
        sampling = self.service.sampling_session(request.path_params["sampler"])
        return {"sampler_id": sampling.id, "base_model": self.service.name, "model_path": sampling.path}

    # ---- results and what is saved -------------------------------------------------------------------------------

    async def retrieve_future(self, request: Request, body: bytes) -> Response:
        asked = wire.understood(types.FutureRetrieveRequest, body)
        job = self.service.job(asked.request_id)
        end = asyncio.get_running_loop().time() + WAIT_S
        pause = 0.002
        while not job.done.is_set():
            if asyncio.get_running_loop().time() > end:
                waits = {"type": "try_again", "request_id": job.request_id, "queue_state": "active"}
                return JSONResponse(waits, 408, HEADERS)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        form, content = await asyncio.to_thread(job.read)
        media = "application/x-protobuf" if form == "pb" else "application/json"
        return Response(content, media_type=media, headers=HEADERS)

    async def training_runs(self, request: Request, body: bytes) -> dict[str, Any]:
        runs = [self._run(model.id) for model in self.service.models.values()]
        return {"training_runs": runs, "cursor": {"offset": 0, "limit": len(runs), "total_count": len(runs)}}

    async def training_run(self, request: Request, body: bytes) -> dict[str, Any]:
        return self._run(request.path_params["run"])

    def _run(self, run: str) -> dict[str, Any]:
        model = self.service.model(run)
        at = self.service.session(run.partition(":")[0])["at"]
        return {
            "training_run_id": run,
            "base_model": self.service.name,
            "model_owner": "here",
            "last_request_time": at,
        } | _lora(model.spec.rank if model.spec else 0)

    async def checkpoints(self, request: Request, body: bytes) -> dict[str, Any]:
        return {"checkpoints": self.service.checkpoints(self.service.model(request.path_params["run"]))}

    async def delete_checkpoint(self, request: Request, body: bytes) -> dict[str, str]:
        model = self.service.model(request.path_params["run"])
        await asyncio.to_thread(self.service.delete_checkpoint, model, request.path_params["place"])
        return {}

    async def weights_info(self, request: Request, body: bytes) -> dict[str, Any]:
        spec = self.service.spec_of(wire.understood(_Path, body).tinker_path)
        flags = {name: getattr(spec, name) for name in ("train_unembed", "train_mlp", "train_attn")}
        return {"base_model": self.service.name} | _lora(spec.rank) | flags


def _lora(rank: int) -> dict[str, Any]:
    return {"is_lora": rank > 0, "lora_rank": rank or None}


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise ApiRefusal(413, f"the body has more than {MOST_BYTES:,} bytes; send fewer data at once")
    except TimeoutError:
        raise ApiRefusal(400, f"the body has not arrived within {BODY_S:g} s") from None
    return bytes(body)


async def _refused(_: Request, error: ApiRefusal) -> Response:
    return JSONResponse({"detail": str(error)}, error.status, HEADERS)


async def _not_here(request: Request, error: object) -> Response:
    message = f"{request.method} {request.url.path}: this server has no such part of Tinker's API"
    return JSONResponse({"detail": message}, 404, HEADERS)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _broken(_: Request, error: Exception) -> Response:
    message = f"the server has a fault: {type(error).__name__}; its standard error has more"
    return JSONResponse({"detail": message}, 500, HEADERS)


HANDLERS: dict[Any, Any] = {
    ApiRefusal: _refused,
    HTTPException: _not_here,
    ClientDisconnect: _gone,
    Exception: _broken,
}
