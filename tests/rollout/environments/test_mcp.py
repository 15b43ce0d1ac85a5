"""MCP servers as environments, by the official SDK: what is asked, what fails and how, and how their processes end."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from copies import OF_REWARDS
from mcp_stub import http_server

from policies.presets import small_tokenizer
from rewards.isolation.environments import EnvironmentFailed, LoadedEnvironments
from rollout.environments.format import BadCall, Call, TurnFormat
from rollout.environments.protocol import open_workers, path_of, run, tools_of
from rollout.sampling import EnvironmentSpec

ROOT = Path(__file__).parents[3]
STUB = f"{sys.executable} -S {ROOT}/tests/cases/mcp_stub.py"
NEEDS = "the MCP SDK is not installed: pip install mcp"


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewards.isolation.pool.subprocess", OF_REWARDS)
        yield


@pytest.fixture(scope="module", params=["stdio", "http"])
def server(request):
    pytest.importorskip("mcp", reason=NEEDS)
    if request.param == "stdio":
        yield STUB
    else:
        with http_server() as http:
            yield http.url


@contextmanager
def environment(server):
    """An episode in this process. It must end here: a session would not let the process end."""
    from rollout.environments.mcp import mcp

    game = mcp(server, 20.0)()
    try:
        yield game
    finally:
        session = game._session
        game._session = None
        if session is not None:
            session.close()


def spec_of(server, **options):
    return EnvironmentSpec(environments=(("", f"mcp:{server}"),), **{"timeout_s": 20.0} | options)


def request_of(calls, episode="a", history=(), ends=False):
    begin = {"environment": "", "columns": {}, "seeds": [0, 0], "turns": []}
    return begin | {"episode": episode, "history": list(history), "calls": calls, "ends": ends}


def gone(pid, within_s=20.0):
    """The process has ended, or nobody has fetched how it ended."""
    end = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_its_tools_have_the_schemas_of_the_server(server):
    spec = spec_of(server)
    form = TurnFormat(small_tokenizer(["3 + 4 = 7\n"]), tools_of(spec, ""))
    assert [schema["function"]["name"] for schema in form.schemas] == ["add", "count", "echo", "fail"]
    assert form.schemas[0]["function"] == {
        "name": "add",
        "description": "Does add.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "Any."},
                "from": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            },
            "required": ["a", "from"],
        },
    }
    assert form.checked("add", {"a": "1", "from": None}) == Call("add", {"a": 1, "from": None})
    assert form.checked("echo", {}) == Call("echo", {})
    [call] = form.read(form._tokenizer.encode('<<add {"a": 1, "from": 2}=')).calls
    with environment(server) as game:
        assert game.add(**call.arguments) == "3"
    with pytest.raises(BadCall, match="Wrong arguments of add: from: Field required"):
        form.checked("add", {"a": 1})


FAILURES = [
    ("error", RuntimeError, None, "it failed"),
    ("wrong", RuntimeError, None, "these arguments are wrong"),
    ("odd", EnvironmentFailed, "raised", "tool 'fail': out of paper"),
    ("die", EnvironmentFailed, "died", "tool 'fail': Connection closed"),
    ("hang", EnvironmentFailed, "timeout", "tool 'fail': .*timed out"),
    ("cut", EnvironmentFailed, ("timeout", "raised"), "tool 'fail': (Request|Failed to parse JSON)"),
]


@pytest.mark.parametrize(("how", "error", "kind", "words"), FAILURES)
def test_contract_6_a_failure_names_the_server_and_the_tool(server, how, error, kind, words):
    """What an isError says, and which arguments are wrong, the policy is told; the rest ends its episode."""
    with environment(server) as game:
        game.echo()
        if how in ("hang", "cut"):
            game._timeout_s = 0.3
        with pytest.raises(error, match=words) as raised:
            game.fail(how=how)
        if kind:
            assert raised.value.kind in kind
            assert str(raised.value).startswith(f"MCP server {server!r}, ")


def test_an_answer_of_http_with_an_error_has_its_status():
    pytest.importorskip("mcp", reason=NEEDS)
    with http_server() as http, environment(http.url) as game:
        with pytest.raises(EnvironmentFailed, match="HTTP 429: "):
            game.fail(how="mute")
        with pytest.raises(EnvironmentFailed, match="Failed to parse JSON"):
            game.fail(how="twice")
    with environment(http.url) as game, pytest.raises(EnvironmentFailed, match=r"/mcp', its first request: ") as raised:
        game.count()
    assert raised.value.kind in ("died", "raised")


def test_an_episode_has_a_server_of_its_own_and_ends_it(tmp_path, monkeypatch):
    pytest.importorskip("mcp", reason=NEEDS)
    pids = tmp_path / "pids"
    path = path_of(spec_of(f"{STUB} --pid {pids}"), "")
    loaded = LoadedEnvironments("", [], {"": path})
    listed = int(pids.read_text())
    monkeypatch.setattr(loaded, "_most", 2)
    for turn in range(2):  # of three episodes two are kept, so the calls of each are repeated
        for name in "abc":
            reply = loaded.call(request_of([["count", {}]], name, [["count", {}]] * turn))
            assert reply == {"observation": None, "results": [(str(turn + 1), False)], "done": False}
    assert loaded.call(request_of([], "c", [["count", {}]] * 2, ends=True))["reward"] is None
    started = list(map(int, pids.read_text().split()))
    assert len(started) == 7
    assert started[0] == listed
    assert [gone(pid) for pid in (*started[:5], started[6])] == [True] * 6
    assert not gone(started[5], within_s=0)  # of "b", whose episode goes on
    loaded._episodes.clear()
    assert gone(started[5])


def test_a_dead_server_is_asked_once_more_and_no_server_outlives_its_worker(tmp_path):
    pytest.importorskip("mcp", reason=NEEDS)
    pids = tmp_path / "pids"
    server = f"{STUB} --deaf --pid {pids}"
    with closing(open_workers(spec_of(server))) as pool:
        assert run(pool, [request_of([["count", {}]])])[0]["results"] == [["1", False]]
        os.kill(int(pids.read_text().split()[-1]), signal.SIGKILL)  # by somebody's hand: the same again
        [reply] = run(pool, [request_of([["count", {}]], history=[["count", {}]])])
        assert reply["results"] == [["2", False]]
        [reply] = run(pool, [request_of([["echo", {"text": "x" * 1_000_001}]])])
        assert reply["results"] == [[str({"error": "echo wrote 1,000,001 characters; it may write 1,000,000"}), True]]
        [dead] = run(pool, [request_of([["fail", {"how": "die"}]], "c")])
        assert dead == {"kind": "died", "message": f"MCP server '{server}', tool 'fail': Connection closed"}
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_what_is_no_server_is_refused_by_name(monkeypatch):
    pytest.importorskip("mcp", reason=NEEDS)
    from rollout.environments.mcp import mcp

    with pytest.raises(ValueError, match="MCP server 'no-such-command --x': there is no such command"):
        mcp("no-such-command --x")
    with pytest.raises(ValueError, match=r"MCP server '.* -c pass', its first request: Connection closed"):
        mcp(f"{sys.executable} -S -c pass")
    listed = [("reset", "", {"properties": {}})]
    monkeypatch.setattr("rollout.environments.mcp._tools_of", lambda server: listed)
    with pytest.raises(ValueError, match="an environment cannot have a tool called 'reset'"):
        mcp("any")
    listed.clear()
    with pytest.raises(ValueError, match="MCP server 'any' lists no tools"):
        mcp("any")


PARENT = """
import json, sys, time
from rewards.isolation.pool import WorkerPool
path, request = json.loads(sys.argv[1])
function = {"kind": "environments", "function": "mcp", "tools": [], "environments": {"": path}}
pool = WorkerPool([function], size=1, timeout_s=60)
print(pool.run([request])[0]["results"], flush=True)
try:
    time.sleep(120)
finally:
    pool.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_server_ends_with_the_run(tmp_path, ended_by):
    """Also one that heeds neither the end of its input nor SIGTERM."""
    pytest.importorskip("mcp", reason=NEEDS)
    pids = tmp_path / "pids"
    asked = [path_of(spec_of(f"{STUB} --deaf --pid {pids}"), ""), request_of([["count", {}]]) | {"function": 0}]
    command = [sys.executable, "-c", PARENT, json.dumps(asked)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "[['1', False]]\n"
        servers = list(map(int, pids.read_text().split()))
        assert psutil.pid_exists(servers[-1])
        parent.send_signal(ended_by)
    assert all(map(gone, servers))
