"""`quartet serve` answers requests for a policy's completions. It runs in one process, or in several by Ray Serve.

It may follow a run that is still training: the newest checkpoint then replaces the policy that is served.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.commands.served import keys_in
from grpo.cli.config.serve import MOST_WAITING, SHUTDOWN_S, WAIT_S, ServeConfig
from grpo.endpoint.hosts import is_loopback
from grpo.source.policy_source import PolicySource, find_policy
from rewards.listening import listen
from rollout.cost_table import Workload
from rollout.decoding.engine import Engine

if TYPE_CHECKING:
    from socket import socket

    from starlette.applications import Starlette

    from grpo.endpoint.served import Served

PACKAGES = "quartet serve needs the packages of the extra serve: pip install 'quartet-rl[serve]'"


def read_keys(file: Path | None, host: str) -> list[str]:
    """Returns the keys of which clients must show one, one a line of the file; none without a file. Raises ValueError
    for another address than loopback without any."""
    if file is None:
        if not is_loopback(host):
            raise ValueError(
                f"host={host!r} lets other machines in; give a file with a key, --api_key_file FILE, or leave --host "
                "out"
            )
        return []
    keys = keys_in(file)
    if any(len(key) < 8 or not key.isascii() or not key.isprintable() for key in keys):
        raise ValueError(f"api_key_file={file}: a key has 8 printable ASCII characters or more, and a line of its own")
    return keys


def load_engine(use: PolicyInUse, newer: PolicySource | None = None, like: Engine | None = None) -> Engine:
    """Returns an engine with this policy, or a newer one. Its depth controller measures costs, or takes those of
    `like`."""
    policy, options = use.load(newer), use.config
    with use.phase("loading"):
        costs = like.costs if like is not None else None
        engine = Engine(policy, getattr(torch, options.dtype), max_rows=options.max_batch_size, costs=costs)
        engine.version = (newer or use.source).step or 0
        if options.rollout.draft_tokens is None and engine.head is not None and costs is None:
            engine.measure_costs(Workload.of(use.sampling(policy), options.max_batch_size))
    return engine


LOOK_S = 5.0


class Follower:
    """Looks every `LOOK_S` seconds. A checkpoint that cannot be loaded is reported once and counted, and the policy
    from before stays. `load` makes an engine of a source, whose version is the source's step."""

    def __init__(
        self, run: str, step: int | None, load: Callable[[PolicySource], Engine], say: Callable[[str], None]
    ) -> None:
        if not (Path(run) / "environment.json").is_file():
            raise ValueError(f"--follow: {run} is no run folder, and nothing else gets newer; leave --follow out")
        self.run, self.step, self.load, self.say = run, step, load, say
        self._failed: str | None = None

    async def keep_up(self, served: Served) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.look, served)

    def look(self, served: Served) -> bool:
        """Looks once. Returns whether there was a newer policy, which then is served."""
        folder = None
        try:
            source = find_policy(self.run, read=False)
            folder = source.folder
            if source.step == self.step or folder == self._failed:
                return False
            source = find_policy(self.run)  # its tensors, now
            engine = self.load(source)
        except Exception as error:
            self._failed = folder
            served.batcher.counts.not_loaded += 1
            self.say(f"{folder or self.run} cannot be served, the policy from before stays: {error}")
            return False
        self.step, served.meaning = source.step, source.meaning
        served.batcher.replace(engine)
        self.say(f"policy version {engine.version} is served from now on: {source.folder} ({source.meaning})")
        return True


def begin_serving(
    config: ServeConfig, say: Callable[[str], None] = print, *, follow: bool = False
) -> tuple[Any, Served]:
    """Returns the ASGI application and what it serves. Raises ValueError without the packages of the extra `serve`."""
    try:
        from grpo.endpoint.app import app
    except ModuleNotFoundError as error:
        raise ValueError(PACKAGES) from error
    from grpo.endpoint.batcher import Batcher
    from grpo.endpoint.served import Served

    keys = read_keys(config.api_key_file, config.host)
    use = PolicyInUse(config)

    def load(newer: PolicySource) -> Engine:
        return load_engine(use, newer, cast("Engine", batcher.engine))

    follower = Follower(config.model, use.source.step, load, say) if follow else None
    engine = load_engine(use)
    params = use.sampling(engine.policy)
    engine.check([], params)
    batcher = Batcher(engine, params, most_waiting=MOST_WAITING, wait_s=WAIT_S)
    served = Served(config.called, batcher, params, use.source.meaning)
    return app(served, keys, starts=partial(follower.keep_up, served) if follower else None), served


def serve(config: ServeConfig, say: Callable[[str], None] = print, *, follow: bool = False) -> None:
    """Serve until a signal comes, see `answer`."""
    read_keys(config.api_key_file, config.host)  # refuses what is wrong before anything listens
    listening, address = listen(config.host, config.port)
    gc.freeze()  # else a body with a million parts makes the collector read all modules again and again: .9 s for .2
    with listening:
        application, served = begin_serving(config, partial(print, file=sys.stderr, flush=True), follow=follow)
        version = f"policy version {served.batcher.engine.version}"
        say(f"{served.name} ({version}, {served.meaning}) at http://{address}/v1   (Ctrl-C ends it)")
        answer(application, listening)


def answer(application: Starlette, listening: socket) -> None:
    """Answer until a signal comes. Then no new request is taken, and those that run have SHUTDOWN_S seconds."""
    import uvicorn

    from grpo.endpoint.connections import settings

    config = settings(application, lifespan="on", timeout_graceful_shutdown=SHUTDOWN_S, timeout_keep_alive=75)
    uvicorn.Server(config).run(sockets=[listening])
