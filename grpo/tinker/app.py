"""Tinker's API as an ASGI application: what its SDK sends is understood by the SDK's own types."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from grpo.endpoint.api_error import ApiError
from grpo.endpoint.door import HEADERS, JSON, MOST_BYTES, Door
from grpo.tinker import sampler, wire
from grpo.tinker.service import Job, Service, check_number, session_of
from grpo.tinker.wire import Asked, Refused

MOST_SMALL, MOST_DATA = 1 << 16, 1 << 26  # bytes of a body without a prompt, and of one with data
MOST_HELD = 1 << 27  # bytes of large bodies that arrive at once
PROTOBUF = "application/x-protobuf"
IDS = ("session", "run", "sampler", "session_id", "model_id", "sampling_session_id", "request_id")
WAIT_S = 5.0  # that a question for a result is held open: an end of the server waits for it
CONFIG = {  # by which the SDK is told what this server has
    "pjwt_auth_enabled": False,
    "use_pyqwest_transport": False,  # HTTP/1.1, without a proxy
    "proto_compress_fwdbwd": False,
    "custom_loss_server_side": False,
    "sample_max_concurrent_requests": 128,
    "sample_enable_stuck_detection": False,  # a laptop is slow
}


CONSTANT: dict[str, dict[str, Any]] = {
    "client/config": CONFIG,
    "client/dynamic_config": {"refresh_interval_sec": 3600},
    "telemetry": {"status": "accepted"},  # and not looked at
    "sessions/{session}/finish": {},
}
OF_MODEL: dict[str, type[BaseModel]] = {
    "create_model": types.CreateModelRequest,
    "load_weights": types.LoadWeightsRequest,
    "optim_step": types.OptimStepRequest,
    "save_weights": types.SaveWeightsRequest,
    "save_weights_for_sampler": types.SaveWeightsForSamplerRequest,
}
Act: TypeAlias = Callable[[Request], Awaitable[object]]


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Tinker's SDK reads it."""
    return {"detail": str(error)}


def app(service: Service, keys: Sequence[str] = ()) -> Starlette:
    """Returns the application. Who shows one of the `keys` has what was made with it; without keys all clients of this
    machine are one."""
    door = Door(error_body, "X-API-Key: ", keys, MOST_HELD)
    api = _Api(service, door)
    acts: dict[str, Act] = {
        "POST create_session": api.create_session,
        "POST session_heartbeat": api.heartbeat,
        "POST get_info": api.get_info,
        "POST forward_backward": api.forward_backward,
        "POST create_sampling_session": api.create_sampling_session,
        "POST asample": api.sample,
        "POST retrieve_future": api.retrieve_future,
        "POST weights_info": api.weights_info,
        "GET healthz": api.health,
        "GET get_server_capabilities": api.capabilities,
        "GET samplers/{sampler}": api.get_sampler,
        "GET training_runs": api.training_runs,
        "GET training_runs/{run}": api.training_run,
        "GET training_runs/{run}/checkpoints": api.checkpoints,
        "DELETE training_runs/{run}/checkpoints/{place:path}": api.delete_checkpoint,
    }
    acts |= {f"POST {path}": constant(content) for path, content in CONSTANT.items()}
    acts |= {f"POST {kind}": api.of_model(kind, body) for kind, body in OF_MODEL.items()}
    routes = []
    for name, act in acts.items():
        method, path = name.split()
        media = PROTOBUF if act == api.forward_backward else JSON
        routes.append(door.route(f"/api/v1/{path}", api.owned(act), method, media))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    return door.application(routes, service.state, lifespan)


def owner_of(request: Request) -> str:
    """Returns what stands for the key of a request in the files of its sessions; nothing without keys."""
    key = request.state.key.encode()
    return hashlib.blake2b(key, digest_size=16).hexdigest() if key else ""


def constant(content: dict[str, Any]) -> Act:
    async def act(request: Request) -> dict[str, Any]:
        return content

    return act


class _Path(BaseModel):
    tinker_path: str


class _Numbered(BaseModel):
    """The part of a request to a model without which it has no place among the others."""

    model_id: str
    seq_id: int = Field(ge=1)


def _place_of(asked: Any) -> tuple[str, int]:
    """The model of a request and its number there. Number 0 makes the model, and names it by its session."""
    if getattr(asked, "session_id", None) is not None:
        number = check_number("model_seq_id", asked.model_seq_id or 0)
        return f"{asked.session_id}:train:{number}", 0
    return asked.model_id, check_number("seq_id", asked.seq_id, 1)


class _Api:
    def __init__(self, service: Service, door: Door) -> None:
        self.service, self.door = service, door

    def owned(self, act: Act) -> Act:
        """Returns `act` for the owner of what the address names. A job that it begins is named in the answer."""

        async def respond(request: Request) -> object:
            self._refuse_others(request, request.path_params)
            answer = await act(request)
            return {"request_id": answer.request_id} if isinstance(answer, Job) else answer

        return respond

    async def _read(self, request: Request, kind: type[Asked]) -> Asked:
        def understand(body: bytes) -> Asked:
            try:
                return wire.understood(kind, body)
            except ApiError as error:
                self._keep_refusal(request, body, error)
                raise

        asked = await self.door.read(request, understand, MOST_SMALL)
        self._refuse_others(request, vars(asked))
        return asked

    def _keep_refusal(self, request: Request, body: bytes, error: ApiError) -> None:
        """Keep that a request to a model was refused, under its number. The SDK sends no other request with it, and
        those with later numbers would wait for it."""
        with suppress(ApiError):  # a body without a number has no place among the others
            asked = wire.understood(_Numbered, body)
            self._refuse_others(request, vars(asked))
            self.service.ask(asked.model_id, asked.seq_id, "refused", json.dumps({"error": str(error)}).encode())

    def _refuse_others(self, request: Request, named: Mapping[str, Any]) -> None:
        """Raises Unknown if something that is named belongs to another key."""
        for name, value in named.items():
            is_id = name in IDS or (isinstance(value, str) and value.startswith(wire.SCHEME))
            if is_id and value is not None:
                self.service.session(value, owner_of(request))

    # ---- clients and sessions ------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return self.door.health(self.service.state())

    async def capabilities(self, request: Request) -> dict[str, Any]:
        context = self.service.base.max_length
        model = {"model_name": self.service.name, "max_context_length": context, "trainable": True, "sampleable": True}
        return {"supported_models": [model]}

    async def create_session(self, request: Request) -> dict[str, str]:
        asked = await self._read(request, types.CreateSessionRequest)
        content = {"tags": asked.tags, "metadata": asked.user_metadata, "owner": owner_of(request)}
        return {"session_id": await asyncio.to_thread(self.service.create_session, content)}

    async def heartbeat(self, request: Request) -> dict[str, str]:
        await self._read(request, types.SessionHeartbeatRequest)
        return {"type": "session_heartbeat"}

    # ---- training ------------------------------------------------------------------------------------------------

    def of_model(self, kind: str, body: type[BaseModel]) -> Act:
        """Returns what asks a model for something of this kind."""

        async def act(request: Request) -> Job:
            asked = await self._read(request, body)
            model_id, number = _place_of(asked)
            content = asked.model_dump_json(exclude_none=True).encode()
            return await asyncio.to_thread(self.service.ask, model_id, number, kind, content)

        return act

    async def forward_backward(self, request: Request) -> Job:
        def ask(body: bytes) -> Job:
            asked = wire.message_of(body)  # the result tells of wrong data
            self._refuse_others(request, {"model_id": asked.model_id})
            number = check_number("seq_id", asked.seq_id, 1)
            return self.service.ask(asked.model_id, number, "forward_backward", body)

        return await self.door.read(request, ask, MOST_DATA)

    async def get_info(self, request: Request) -> dict[str, Any]:
        asked = await self._read(request, types.GetInfoRequest)
        model = self.service.model(asked.model_id)
        rank = model.spec.rank if model.spec else 0
        name = self.service.name
        data = {"arch": self.service.base.config.model_type, "model_name": name, "tokenizer_id": name}
        return {"type": "get_info", "model_id": model.id, "model_name": name, "model_data": data} | _lora(rank)

    # ---- sampling ------------------------------------------------------------------------------------------------

    async def create_sampling_session(self, request: Request) -> dict[str, str]:
        asked = await self._read(request, types.CreateSamplingSessionRequest)
        if asked.model_path is None and asked.base_model != self.service.name:
            raise Refused(f"base_model={asked.base_model!r:.80}: this server has {self.service.name!r}")
        add, number = self.service.add_sampler, asked.sampling_session_seq_id
        return {"sampling_session_id": await asyncio.to_thread(add, asked.session_id, number, asked.model_path)}

    async def sample(self, request: Request) -> dict[str, Any]:
        def ask(body: bytes) -> dict[str, Any]:
            asked = wire.understood(types.SampleRequest, body)
            self._refuse_others(request, vars(asked))
            if asked.sampling_session_id is None:
                raise Refused("sampling_session_id: create a sampling session first")
            sampler.read(asked.model_dump(exclude_none=True), "", (), self.service.base.max_length)  # before it is kept
            kept = asked.model_dump_json(exclude_none=True).encode()
            job = self.service.ask_sampler(asked.sampling_session_id, asked.seq_id, kept)
            names = [f"{job.request_id}:{sample}" for sample in range(asked.num_samples)]
            return {"request_id": job.request_id, "sample_sequence_ids": names}

        return await self.door.read(request, ask, MOST_BYTES)

    async def get_sampler(self, request: Request) -> dict[str, Any]:
        sampling = self.service.sampling_session(request.path_params["sampler"])
        return {"sampler_id": sampling.id, "base_model": self.service.name, "model_path": sampling.path}

    # ---- results and what is saved -------------------------------------------------------------------------------

    async def retrieve_future(self, request: Request) -> Response:
        asked = await self._read(request, types.FutureRetrieveRequest)
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
        return Response(content, media_type=PROTOBUF if form == "pb" else JSON, headers=HEADERS)

    async def training_runs(self, request: Request) -> dict[str, Any]:
        owner = owner_of(request)
        runs = [self._run(model_id) for model_id in list(self.service.models) if self.service.owns(owner, model_id)]
        return {"training_runs": runs, "cursor": {"offset": 0, "limit": len(runs), "total_count": len(runs)}}

    async def training_run(self, request: Request) -> dict[str, Any]:
        return self._run(request.path_params["run"])

    def _run(self, run: str) -> dict[str, Any]:
        model = self.service.model(run)
        at = self.service.sessions[session_of(run)]["at"]
        return {
            "training_run_id": run,
            "base_model": self.service.name,
            "model_owner": "here",
            "last_request_time": at,
        } | _lora(model.spec.rank if model.spec else 0)

    async def checkpoints(self, request: Request) -> dict[str, Any]:
        return {"checkpoints": self.service.checkpoints(self.service.model(request.path_params["run"]))}

    async def delete_checkpoint(self, request: Request) -> dict[str, str]:
        model = self.service.model(request.path_params["run"])
        await asyncio.to_thread(self.service.delete_checkpoint, model, request.path_params["place"])
        return {}

    async def weights_info(self, request: Request) -> dict[str, Any]:
        asked = await self._read(request, _Path)
        spec = self.service.spec_of(asked.tinker_path)
        flags = {name: getattr(spec, name) for name in ("train_unembed", "train_mlp", "train_attn")}
        return {"base_model": self.service.name} | _lora(spec.rank) | flags


def _lora(rank: int) -> dict[str, Any]:
    return {"is_lora": rank > 0, "lora_rank": rank or None}
