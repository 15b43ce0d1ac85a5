"""Bad servers: each is an error with the way out, in bounded time. They are real ones, on loopback."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from local_server import serving

from rollout.faults import RolloutError
from rollout.vllm.client import PROTOCOL, Client, Lost

STATE = {"protocol": PROTOCOL, "vllm": "0.32.0", "on_cpu": True, "tried": True, "tried_versions": ["0.32.0"]}


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Client]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def do_POST(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with serving(server):
        yield Client(f"http://127.0.0.1:{server.server_port}", "t" * 16, why=lambda: "the end of its log")


def said(status: int, body: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody else gets it, and nobody listens there
        with pytest.raises(Lost, match=rf"127.0.0.1:{port} is lost at /state .*refused.*and now"):
            Client(f"http://127.0.0.1:{port}", "t" * 16, why=lambda: "and now").state()


def test_an_address_that_is_none():
    for url in ("localhost:8000", "https://host", "http://", "http://host:1/v1"):
        with pytest.raises(ValueError, match=r"rollout.vllm.url='.*expected http://HOST:PORT"):
            Client(url, "t" * 16)


def test_an_upload_that_is_refused_before_it_was_read():
    """The connection breaks while we still send; the answer says why."""
    with server(said(401, b'{"error": "wrong token"}')) as client, pytest.raises(RolloutError, match="our token"):
        client.upload("/publish", {}, [memoryview(bytes(1 << 20))] * 64, 64 << 20, limit_s=10)


ANSWERS = [
    ("/state", 401, b'{"error": "wrong token"}', "refuses our token; .* the environment variable QUARTET_VLLM_TOKEN"),
    ("/state", 200, b"<html>It works!</html>", "is no server of ours"),
    ("/state", 200, b"[1]", "is no server of ours"),
    ("/state", 200, b"{}", f"speaks protocol None, and this quartet {PROTOCOL}"),
    ("/state", 200, json.dumps(STATE | {"protocol": 99}).encode(), "speaks protocol 99"),
    ("/state", 200, b"", "closed the connection before its answer was whole.*the end of its log"),
    ("/load", 500, b'{"error": "ValueError: no such type"}', "cannot answer /load: ValueError: no such type"),
    ("/sample", 200, b'{"ended": 1}\n{"error": "RuntimeError: full"}\n', "cannot answer /sample: RuntimeError: full"),
]


def test_answers_of_servers_that_are_not_ours_or_cannot_do_it():
    with server(said(200, json.dumps(STATE).encode())) as client:
        assert client.state() == STATE
    for path, status, body, message in ANSWERS:
        with server(said(status, body)) as client, pytest.raises(RolloutError, match=message):
            client.state() if path == "/state" else list(client.post(path, {}, limit_s=10))

    def plain(request: BaseHTTPRequestHandler) -> None:
        known = request.path == "/version"
        said(200 if known else 404, b'{"version": "0.32.0"}' if known else b'{"detail": "Not Found"}')(request)

    with server(plain) as client, pytest.raises(RolloutError, match=r"a plain `vllm serve` .*quartet_server.py"):
        client.state()


def test_a_server_that_dies_in_the_middle():
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b'{"ended": 1}\n')
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)

    with server(answer) as client:
        lines = client.post("/sample", {}, limit_s=10)
        assert next(lines) == {"ended": 1}
        with pytest.raises(RolloutError, match="is lost at /sample .*before its answer was whole.*end of its log"):
            next(lines)


@pytest.mark.parametrize("first", [False, True])
def test_a_server_that_hangs(first):
    """Before its first line, or after one; the limit is of the silence and not of the whole."""
    release = threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        if first:
            request.send_response(200)
            request.end_headers()
            for ended in range(4):
                time.sleep(0.2)
                request.wfile.write(json.dumps({"ended": ended}).encode() + b"\n")
                request.wfile.flush()
        release.wait(30)

    with server(answer) as client:
        got = []
        with pytest.raises(Lost, match="has not answered /sample for 0.5 s.*the end of its log"):
            got.extend(client.post("/sample", {}, limit_s=0.5))
        release.set()
    assert len(got) == (4 if first else 0)


def test_a_stop_ends_the_wait():
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    release = threading.Event()
    with server(lambda request: release.wait(30)) as client:
        client.while_waiting = stop
        with pytest.raises(Stop):
            client.state()
        release.set()
