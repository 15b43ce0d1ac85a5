"""What all three servers refuse, and how: the agents' endpoint, `quartet serve` and Tinker's API."""

import http.client
import json
import socket
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import psutil
import pytest
import torch
import uvicorn

from grpo.endpoint import body as bodies
from grpo.endpoint import connections
from grpo.endpoint import door as doors
from grpo.endpoint.app import app
from grpo.endpoint.batcher import Batcher
from grpo.endpoint.connections import settings
from grpo.endpoint.endpoint import Endpoint
from grpo.endpoint.episode import Episode
from grpo.endpoint.hosts import host_of, is_loopback
from grpo.endpoint.served import Served
from policies.policy import Policy
from rewards.listening import listen
from rollout.decoding.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams

KEY = "secret-of-ours"
JSON = {"Content-Type": "application/json"}
COMPLETION = {"model": "micro", "prompt": "1", "max_tokens": 1}
SESSION = {"tags": [], "user_metadata": None, "sdk_version": "1", "type": "create_session"}


@dataclass
class Server:
    """A server, the address of a question with a good body, and what shows the key if it wants one."""

    address: str
    path: str
    good: dict[str, Any]
    door: doors.Door
    key: dict[str, str] = field(default_factory=dict)

    def send(self, body=b"", method="POST", path=None, **headers) -> tuple[int, dict]:
        """What the server answers. A header that is None is left out; `content_length` may say more than is sent."""
        own = {name.replace("_", "-").title(): value for name, value in headers.items()}
        sent = {name: value for name, value in (JSON | self.key | own).items() if value is not None}
        with closing(http.client.HTTPConnection(self.address, timeout=20)) as connection:
            connection.request(method, path or self.path, body, sent)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def said(self, answer: dict) -> str:
        """The message of an error, which has the form of the API."""
        if "detail" in answer:
            assert set(answer) == {"detail"}
            return answer["detail"]
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return answer["error"]["message"]

    def asks_well(self) -> bool:
        return self.send(json.dumps(self.good).encode())[0] == 200

    def begin(self, body=b"{", length=500, about="") -> socket.socket:
        """A request whose body has begun."""
        lines = [f"POST {self.path} HTTP/1.1", f"Host: {self.address}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in self.key.items()]
        lines.append(about or f"Content-Length: {length}")
        connection = socket.create_connection(self.address.split(":"), timeout=20)
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return connection

    def health(self) -> int:
        with closing(http.client.HTTPConnection(self.address, timeout=1)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status


def answer_of(connection: socket.socket) -> tuple[int, dict]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def policy(random_policy) -> Policy:
    return random_policy(3)


@pytest.fixture(scope="module")
def batcher(policy):
    params = SamplingParams(1, 1.0, 12, (0,), seed=5)
    batcher = Batcher(Engine(policy, max_rows=8), params, most_waiting=100, wait_s=0.005)
    yield batcher
    batcher.close()


@pytest.fixture(scope="module")
def listening():
    """Begins servers of applications, which end with the module."""
    begun = []

    def begin(application):
        listening, address = listen("127.0.0.1", 0)
        server = uvicorn.Server(settings(application, lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        begun.append((server, thread, listening))
        return address

    yield begin
    for server, thread, listening in begun:
        server.should_exit = True
        thread.join(20)
        listening.close()


@pytest.fixture(scope="module")
def open_server(policy, batcher, listening, tmp_path_factory):
    """Opens the server of a name, with keys or without."""
    opened: dict[str, Any] = {}

    def serve(keys):
        application = app(Served("micro", batcher, batcher.params, "as given"), keys)
        shown = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        return Server(listening(application), "/v1/completions", COMPLETION, application.state.door, shown)

    def tinker(keys):
        pytest.importorskip("tinker", reason="the SDK of the extra tinker is not installed")
        from grpo.tinker.app import app as tinker_app
        from grpo.tinker.service import Service

        if "service" not in opened:
            opened["service"] = Service(policy, "micro", tmp_path_factory.mktemp("state"), torch.float32)
        application = tinker_app(opened["service"], keys)
        shown = {"X-Api-Key": keys[0]} if keys else {}
        return Server(listening(application), "/api/v1/create_session", SESSION, application.state.door, shown)

    def endpoint(keys):
        opened["endpoint"] = own = Endpoint()
        prompt = Prompt("a", "1", policy.tokenizer.encode("1"))
        base = own.open(Episode(prompt, 0, batcher, batcher.params, 1.0)).removeprefix(f"http://{own._address}")
        return Server(
            own._address, f"{base}/completions", COMPLETION, own._door, {"Authorization": f"Bearer {own.key}"}
        )

    kinds = {"endpoint": endpoint, "serve": serve, "tinker": tinker}
    yield cache(lambda name, keys=(): kinds[name](keys))
    for name in ("endpoint", "service"):
        if name in opened:
            opened[name].close()


@pytest.fixture(params=["endpoint", "serve", "tinker"])
def server(request, open_server) -> Server:
    """One of the three; the endpoint has a key, and the others have none."""
    return open_server(request.param)


@pytest.fixture(params=["endpoint", "serve", "tinker"])
def guarded(request, open_server) -> Server:
    return open_server(request.param, (KEY, "another-key"))


@pytest.fixture
def impatient(monkeypatch) -> None:
    """A body that nobody refuses is given up long before its client is: the test fails by the answer."""
    monkeypatch.setattr(doors, "BODY_S", 3.0)


NUMBER = b'{"model": "micro", "prompt": "1", "user_metadata": {"rate": [1, N]}, "metadata": {"rate": [1, N]}}'
HOSTILE = {
    "page of another host": ({"origin": "http://evil.example"}, 403, "origin 'http://evil.example'"),
    "page of a file": ({"origin": "null"}, 403, "origin 'null'"),
    "text": ({"content_type": "text/plain"}, 415, "Content-Type: application/json"),
    "form": ({"content_type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
    "no type": ({"content_type": None}, 415, "Content-Type"),
    "NaN": ({"body": NUMBER.replace(b"N]", b"NaN]")}, 400, "metadata.rate.1=nan: use a finite number"),
    "Infinity": ({"body": NUMBER.replace(b"N]", b"-Infinity]")}, 400, "use a finite number"),
    "1e999": ({"body": NUMBER.replace(b"N]", b"1e999]")}, 400, "use a finite number"),
    "5,000 digits": ({"body": NUMBER.replace(b"N]", b"1" * 5000 + b"]")}, 400, "not JSON"),
    "half an object": ({"body": b"{"}, 400, "not JSON"),
    "list": ({"body": b"[]"}, 400, "send an object"),
    "key that is there twice": ({"body": b'{"model": 1, "model": 1}'}, 400, "there twice"),
    "deep": ({"body": b"[" * 60_000}, 400, "nested"),
    "half a character": ({"body": b'{"model": "\\ud800"}'}, 400, "lone surrogate"),
    "not UTF-8": ({"body": b'{"model": "\xff"}'}, 400, "not JSON"),
    "missing field": ({"body": b"{}"}, 400, "is missing"),
    "wrong field": ({"body": b'{"tags": 5}'}, 400, "tags"),
    "other address": ({"path": "/v1/nothing"}, 404, "no such part of the API"),
    "long address": ({"path": "/v1/" + "a" * 20_000}, 404, "no such part of the API"),
    "other method": ({"method": "PUT"}, 405, "no such part of the API"),
    "large body": ({"content_length": str(1 << 30)}, 413, "bytes; shorten it"),
}


def refused(server: Server, name: str) -> None:
    request, status, words = HOSTILE[name]
    found, answer = server.send(**{"body": json.dumps(server.good).encode()} | request)
    assert found == status, answer
    assert words in server.said(answer)
    assert len(server.said(answer)) < 400


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_in_the_form_of_the_api(server, name, capfd):
    refused(server, name)
    assert server.health() == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_key_is_wanted_where_there_is_one_and_any_of_several_is_taken(guarded):
    [(header, right)] = guarded.key.items()
    for shown in (None, "", "wrong", f"{right}x", right[:-1], "\xff"):
        status, answer = guarded.send(b"{}", **{header: shown})
        assert status == 401
        assert f"send {header}" in guarded.said(answer).replace("X-API", "X-Api")
    assert guarded.asks_well()
    assert guarded.send(json.dumps(guarded.good).encode(), host="elsewhere.example")[0] == 200
    if KEY in right:
        guarded.key = {header: right.replace(KEY, "another-key")}
        assert guarded.asks_well()
        guarded.key = {header: right}
    assert guarded.health() == 200  # which needs none


@pytest.mark.parametrize("name", ["serve", "tinker"])
def test_without_a_key_only_hosts_and_pages_of_this_machine_are_answered(open_server, name):
    server = open_server(name)
    good = json.dumps(server.good).encode()
    for host in ("evil.example", "10.0.0.2:80", "localhost.evil.example", "[", ""):
        status, answer = server.send(good, host=host)
        assert (status, "without a key only localhost" in server.said(answer)) == (403, True)
    for host in ("127.0.0.2:80", "LOCALHOST:80", "[::1]:80"):
        assert server.send(good, host=host)[0] == 200
    for origin in ("http://localhost:3000", "http://127.0.0.1"):
        assert server.send(good, origin=origin)[0] == 200


def test_hosts_of_this_machine():
    assert [is_loopback(name) for name in ("127.0.0.1", "::1", "LocalHost", "0.0.0.0", "10.0.0.1", "", "a")] == [
        *(True, True, True, False, False, False, False)
    ]
    assert [host_of(name) for name in ("a:80", "https://A", "[::1]:8", "null", "[", "")] == [
        *("a", "a", "::1", "null", "", "")
    ]


def test_health_is_answered_while_large_bodies_trickle_and_one_is_read(server, monkeypatch):
    begun, goes_on, parse = threading.Event(), threading.Event(), bodies.parse_json

    def slowly(text):
        begun.set()
        goes_on.wait(20)
        return parse(text)

    monkeypatch.setattr(bodies, "parse_json", slowly)
    asking = threading.Thread(target=server.asks_well)
    with server.begin(b" " * 40_000, 60_000) as trickling:
        asking.start()
        try:
            assert begun.wait(20)
            for _ in range(5):
                trickling.sendall(b" ")
                assert server.health() == 200  # within a second
        finally:
            goes_on.set()
            asking.join()


def test_a_body_that_does_not_arrive_or_does_not_end_is_given_up(server, monkeypatch, impatient):
    with server.begin(b"800000\r\n" + b" " * 0x800000 + b"\r\n", about="Transfer-Encoding: chunked") as endless:
        assert answer_of(endless)[0] == 413
    monkeypatch.setattr(doors, "BODY_S", 0.2)
    server.begin().close()
    with server.begin() as late:
        late.settimeout(5)
        status, answer = answer_of(late)
        assert (status, "has not arrived within 0.2 s" in server.said(answer)) == (408, True)
    monkeypatch.undo()
    assert server.asks_well()


def test_large_bodies_are_bounded_together_and_small_ones_pass(server, monkeypatch, impatient):
    monkeypatch.setattr(doors, "LARGE", 2_000)
    monkeypatch.setattr(server.door, "most_held", 10_000)
    with server.begin(b" " * 6_000, 6_001) as first:
        until(lambda: server.door.held == 6_000)
        with server.begin(b" " * 6_000, 6_001) as second:
            status, answer = answer_of(second)
        assert (status, "too many large bodies" in server.said(answer)) == (429, True)
        assert server.asks_well()
        first.close()
        until(lambda: server.door.held == 0)
    assert server.send(b" " * 6_000)[0] == 400  # it was read: what the others held is free


def test_a_head_that_does_not_arrive_or_is_no_http_is_given_up(server, monkeypatch):
    def opened(sent=b""):
        connection = socket.create_connection(server.address.split(":"), timeout=20)
        connection.sendall(sent)
        return connection

    with opened(b"\x16\x03\x01 no HTTP\r\n\r\n") as other:
        status, answer = answer_of(other)
        assert (status, "no request that HTTP/1.1 knows" in server.said(answer)) == (400, True)
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with opened(b"POST /v1/comple") as part, opened() as nothing:
        for _ in range(4):  # more of it does not help
            part.sendall(b"t")
            time.sleep(0.02)
        status, answer = answer_of(part)
        assert (status, "head of a request has not arrived" in server.said(answer)) == (408, True)
        assert not nothing.recv(1)
    head = f"POST /v1/nothing HTTP/1.1\r\nHost: {server.address}\r\nContent-Length: 500\r\n\r\n"
    with opened(head.encode()) as unknown:  # and then the body goes on for ever
        assert answer_of(unknown)[0] == 404
        unknown.sendall(b" ")
        assert not unknown.recv(1)
    assert server.asks_well()


@pytest.mark.usefixtures("impatient")
def test_300_hostile_requests_leave_no_memory(server):
    """Small ones of each kind, and bodies of some megabytes that are refused or left: 300 MB together."""
    names, process = list(HOSTILE), psutil.Process()
    for name in names:
        refused(server, name)
    before = process.memory_info().rss
    for number in range(300):
        refused(server, names[number % len(names)])
        if number % 3 == 0:
            server.begin(b" " * 3_000_000, 4_000_000).close()
        if number % 10 == 0:
            assert server.health() == 200
    until(lambda: server.door.held == 0)
    assert process.memory_info().rss - before < 100 << 20
    assert server.asks_well()


def until(true, seconds=20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
