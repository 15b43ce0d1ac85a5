"""`quartet serve` answers requests for a policy's completions. It runs in one process, or in several by Ray Serve."""

from __future__ import annotations

import gc
import ipaddress
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from grpo.cli.config.serve import ServeConfig
from grpo.run.listening import listen
from grpo.run.memory_errors import phase
from grpo.source.policy_source import PolicySource, find_policy, load_found
from grpo.task.check import check_plan
from grpo.task.sampling import sampling_params
from rollout.depth import Workload
from rollout.engine import Engine

if TYPE_CHECKING:
    from grpo.endpoint.served import Served

PACKAGES = "quartet serve needs the packages of the extra serve: pip install 'quartet-rl[serve]'"


def read_key(config: ServeConfig) -> str | None:
    """The key that clients must show. Raises ValueError for another address than loopback without one."""
    if config.api_key_file is None:
        if not _is_loopback(config.host):
            raise ValueError(
                f"host={config.host!r} lets other machines in; give a file with a key, --api_key_file FILE, or leave "
                "--host out"
            )
        return None
    if not config.api_key_file.is_file():
        raise ValueError(f"api_key_file={config.api_key_file}: there is no such file; write the key into it")
    key = config.api_key_file.read_text(encoding="utf-8").strip()
    if len(key) < 8 or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"api_key_file={config.api_key_file}: a key has 8 printable ASCII characters or more, in one line"
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_engine(config: ServeConfig, source: PolicySource, like: Engine | None = None) -> Engine:
    """An engine with the policy of `source`. Its depth controller takes the costs of the engine `like` it, or measures
    them."""
    policy = load_found(source, config)
    with phase("loading", config):
        costs = like.costs if like is not None else None
        engine = Engine(policy, getattr(torch, config.dtype), max_rows=config.max_batch_size, costs=costs)
        engine.version = source.step or 0
        if config.draft_tokens is None and engine.head is not None and costs is None:
            params = sampling_params(policy, config, 1, 0, dtype=config.dtype)
            engine.measure_costs(Workload.of(params, config.max_batch_size))
    return engine


def begin(config: ServeConfig, say: Callable[[str], None] = print, *, follow: bool = False) -> tuple[Any, Served]:
    """The ASGI application and what it serves. Raises ValueError without the packages of the extra `serve`."""
    try:
        from grpo.endpoint.app import app
    except ModuleNotFoundError as error:
        raise ValueError(PACKAGES) from error
    from grpo.cli.serve.follow import Follower
    from grpo.endpoint.batcher import Batcher
    from grpo.endpoint.served import Served

    key = read_key(config)
    source = find_policy(config.model)
    engines: list[Engine] = []

    def load(newer: PolicySource) -> Engine:
        return load_engine(config, newer, engines[0])

    check_plan(config, source)
    follower = Follower(config.model, source.step, load, say) if follow else None
    engines.append(load_engine(config, source))
    params = replace(sampling_params(engines[0].policy, config, 1, 0, dtype=config.dtype), margin=config.margin)
    engines[0].check([], params)
    batcher = Batcher(engines[0], params, most_waiting=config.max_queue, wait_s=config.batch_wait_ms / 1e3)
    served = Served(config.called, batcher, params, source.meaning)
    return app(served, key, starts=partial(follower.keep_up, served) if follower else None), served


def serve(config: ServeConfig, say: Callable[[str], None] = print, *, follow: bool = False) -> None:
    """Serve until a signal comes. Then no new request is taken, and those that run have `shutdown_s` seconds."""
    key = read_key(config)
    if config.backend == "vllm":
        from grpo.cli.serve.by_vllm import serve_by_vllm

        if follow:
            raise ValueError("--follow is for backend=native, our own engine; drop one of the two")
        return serve_by_vllm(config, key, say)
    if (config.max_replicas or config.replicas) > 1:
        from grpo.cli.serve.replicas import serve_replicas

        return serve_replicas(config, partial(begin, follow=follow), say)
    listening, address = listen(config.host, config.port)
    gc.freeze()  # else a body with a million parts makes the collector read all modules again and again: .9 s for .2
    with listening:
        application, served = begin(config, partial(print, file=sys.stderr, flush=True), follow=follow)
        import uvicorn

        from grpo.endpoint.connections import settings

        version = f"policy version {served.batcher.engine.version}"
        say(f"{served.name} ({version}, {served.meaning}) at http://{address}/v1   (Ctrl-C ends it)")
        own = {"lifespan": "on", "timeout_graceful_shutdown": config.shutdown_s, "timeout_keep_alive": 75}
        uvicorn.Server(settings(application, **own)).run(sockets=[listening])
