"""`quartet serve --replicas N`: Ray Serve starts and restarts copies of the server at one address."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from grpo.cli.config.serve import MOST_WAITING, SHUTDOWN_S, ServeConfig
from rollout.cluster import start_ray, stop_ray

PACKAGES = "replicas={}: Ray Serve's packages are missing: pip install 'quartet-rl[serve-ray]'"

Begin = Callable[[ServeConfig, Callable[[str], None]], tuple[Any, Any]]


def serve_replicas(config: ServeConfig, begin: Begin, say: Callable[[str], None]) -> None:
    """Serve until a signal comes. Every replica loads its own copy of the policy by `begin`, and has `threads`
    processors, a queue and a batch. Raises ValueError without the packages of the extra `serve-ray`."""
    try:
        from ray import serve
        from ray.serve.config import HTTPOptions
    except ImportError as error:
        raise ValueError(PACKAGES.format(config.replicas)) from error
    threads = config.threads or 1
    folder = Path(config.model)  # a replica works in another one
    model = str(folder.absolute()) if folder.exists() else config.model
    options = config.model_copy(update={"threads": threads, "model": model, "replicas": 1})
    start_ray(cpus=config.replicas * threads + 1)
    try:
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port))

        def build() -> Any:  # a function: Ray Serve takes any other callable for the application itself
            application, _ = begin(options, partial(print, file=sys.stderr, flush=True))
            return application

        deployment = serve.deployment(
            serve.ingress(build)(type("Policy", (), {})),
            name="policy",
            ray_actor_options={"num_cpus": threads},
            max_ongoing_requests=config.max_batch_size + MOST_WAITING,
            graceful_shutdown_timeout_s=SHUTDOWN_S,
            num_replicas=config.replicas,
        )
        serve.run(deployment.bind(), name="quartet", route_prefix="/")
        address = f"http://{config.host}:{config.port}/v1"
        say(f"{config.called} in {config.replicas} replicas at {address}   (Ctrl-C ends it)")
        threading.Event().wait()  # a signal raises out of it
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        serve.shutdown()
        stop_ray()
