"""What Ray Serve is given. Its packages are an extra that the tests do without."""

import sys
import types
from typing import Any

import pytest

from grpo.cli.config.serve import ServeConfig
from grpo.cli.serve import replicas
from rewards.config.options import load


class Stop(Exception):
    pass


def test_a_replica_builds_its_own_application_by_a_plain_function(monkeypatch):
    """Ray Serve 2.60 takes a partial for the application, and answers every request with status 500."""
    given: dict[str, Any] = {}

    def ingress(build):
        given["build"] = build
        raise Stop

    config = types.SimpleNamespace(HTTPOptions=lambda **_: None)
    nothing = {name: lambda **_: None for name in ("start", "shutdown", "deployment")}
    serve = types.SimpleNamespace(ingress=ingress, config=config, **nothing)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setitem(sys.modules, "ray.serve.config", config)
    monkeypatch.setattr("ray.serve", serve, raising=False)
    monkeypatch.setattr(replicas, "start_ray", lambda **_: None)
    monkeypatch.setattr(replicas, "stop_ray", lambda: None)
    monkeypatch.setattr(replicas.signal, "signal", lambda *_: None)
    asked = load(ServeConfig, None, {"model": "micro", "replicas": 2})
    with pytest.raises(Stop):
        replicas.serve_replicas(asked, lambda own, say: (own.replicas, own.threads), print)
    assert isinstance(given["build"], types.FunctionType)
    assert given["build"]() == 1
