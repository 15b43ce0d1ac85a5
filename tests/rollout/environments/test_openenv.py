"""A server built with OpenEnv's package, on loopback, as an environment in TRL's contract (pip install openenv)."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from policies.presets import small_tokenizer
from rollout.environments.format import Call, TurnFormat

SERVER = Path(__file__).parents[2] / "cases/openenv_server.py"


@pytest.fixture(scope="module")
def url():
    pytest.importorskip("openenv.core.mcp_client", reason="OpenEnv is not installed: pip install openenv")
    with socket.create_server(("127.0.0.1", 0)) as listening:  # whoever connects before it serves waits for it
        port, number = listening.getsockname()[1], listening.fileno()
        server = subprocess.Popen([sys.executable, str(SERVER), str(number)], pass_fds=[number])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_a_session_ends_with_its_episode(monkeypatch):
    from rollout.environments import openenv

    class Client:
        def __init__(self):
            self.closed = threading.Event()

        def connect(self):
            pass

        def reset(self, **columns):
            self.columns = columns
            return SimpleNamespace(reward=None, done=False)

        def close(self):
            self.closed.set()

    clients = []
    monkeypatch.setattr(openenv, "_client", lambda url: clients.append(Client()) or clients[-1])
    episode = type("Maze", (openenv.OpenEnv,), {"_url": "http://127.0.0.1:1"})()
    episode.reset()
    episode.reset(seed=7, level="hard")  # data may have seeds of their own
    assert clients[0].columns.keys() == {"seed"}
    assert clients[1].columns == {"seed": 7, "level": "hard"}
    assert clients[0].closed.wait(10)
    assert not clients[1].closed.is_set()
    del episode
    assert clients[1].closed.wait(10)


def test_types_and_names_of_tools_are_those_of_the_server():
    """Optional and union types, and names that Python does not have."""
    from rollout.environments.openenv import OpenEnv, _method

    numbers = {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}], "default": None}
    properties = {"numbers": numbers, "max-results": {"type": "integer"}, "unit": {"type": ["string", "null"]}}
    schema = {"type": "object", "properties": properties, "required": ["max-results"]}
    about = "Looks numbers up.\n\nArgs:\n    numbers: Which ones.\n"
    tool = SimpleNamespace(name="look-up", description=about, input_schema=schema)
    kind = type("Maze", (OpenEnv,), {"_url": "http://127.0.0.1:1", "look-up": _method(tool)})
    asked = []
    kind._call = lambda self, name, arguments: asked.append((name, arguments)) or "found"
    method = getattr(kind(), "look-up")
    form = TurnFormat(small_tokenizer(["3 + 4 = 7\n"]), [method])
    function = form.schemas[0]["function"]
    assert (function["name"], function["description"]) == ("look-up", "Looks numbers up.")
    assert function["parameters"]["properties"]["numbers"]["anyOf"] == numbers["anyOf"]
    assert function["parameters"]["properties"]["numbers"]["description"] == "Which ones."
    arguments = {"numbers": [1, 2], "max-results": 3, "unit": None}
    [call] = form.read(form._tokenizer.encode(f"<<look-up {json.dumps(arguments)}=")).calls
    assert call == Call("look-up", arguments)
    assert method(**call.arguments) == "found"
    assert asked == [("look-up", arguments)]
    refused = form.read(form._tokenizer.encode('<<look-up {"numbers": [1]}='))
    assert "max-results" in refused.error


@pytest.mark.parametrize("name", ["reset", "get_reward", "_call", "done"])
def test_a_tool_that_would_replace_a_method_of_the_environment_is_refused(monkeypatch, name):
    from rollout.environments import openenv

    tool = SimpleNamespace(name=name, description="", input_schema={})
    client = SimpleNamespace(connect=lambda: None, reset=lambda: None, list_tools=lambda: [tool], close=lambda: None)
    monkeypatch.setattr(openenv, "_client", lambda url: client)
    with pytest.raises(ValueError, match=f"http://127.0.0.1:1.* cannot have a tool called {name!r}; rename it there"):
        openenv.openenv("http://127.0.0.1:1")


@pytest.mark.peer
def test_an_openenv_server_is_an_environment(url):
    from rollout.environments.openenv import openenv

    environment = openenv(url)()
    assert environment.reset(number=5, answer="unused") is None
    form = TurnFormat(small_tokenizer(["3 + 4 = 7\n"]), [environment.guess])
    function = form.schemas[0]["function"]
    assert (function["name"], function["description"]) == ("guess", "Guesses the number.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "number": {"type": "integer", "description": "From 1 to 9."},
            "politely": {"type": "boolean", "description": "Whether to say please."},
        },
        "required": ["number"],
    }
    [call] = form.read(form._tokenizer.encode('<<guess {"number": "3"}=')).calls
    assert call == Call("guess", {"number": 3})
    assert environment.guess(**call.arguments) == "higher"
    assert (environment.done, environment.get_reward()) == (False, -0.1)
    with pytest.raises(RuntimeError, match="from 1 to 9"):
        environment.guess(number=10)
    assert environment.guess(number=5, politely=False) == "right"
    assert (environment.done, round(environment.get_reward(), 6)) == (True, 0.8)
