"""Requests and connections that are made to harm a server. benchmarks/attacks/serve.py has the large ones, timed."""

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from pydantic import ValidationError
from serving_cases import Running, until

from grpo.endpoint import connections, served
from grpo.endpoint.asked import ChatAsked
from grpo.endpoint.connections import most_connections, settings
from rewards.config.json_file import parse_json
from rollout.decoding.shard import Decoding
from rollout.request import Request

TOOL = {"type": "function", "function": {"name": "f", "description": "word " * 10_000}}


def chat(**fields) -> dict:
    return {"model": "micro", "messages": [{"role": "user", "content": "2"}], "max_tokens": 2} | fields


def opened(address: str, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address.split(":"), timeout=20)
    connection.sendall(sent)
    return connection


def half(address: str, body: bytes = b"{", length: int = 500) -> socket.socket:
    """A request whose body does not end."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    return opened(address, f"{head}Content-Length: {length}\r\n\r\n".encode() + body)


def answer(connection: socket.socket) -> tuple[int, dict]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())["error"]


def is_closed(connection: socket.socket, most: int = 1) -> bool:
    try:
        return not connection.recv(most)
    except ConnectionError:
        return True


def test_a_key_that_is_there_twice_is_found_in_linear_time():
    text = "{" + ",".join(f'"key{i}": 1' for i in range(14_000)) + ', "key13999": 1}'
    start = time.process_time()
    with pytest.raises(ValueError, match="the key 'key13999' is there twice"):
        parse_json(text)
    assert time.process_time() - start < 1


def test_completions_are_counted_before_a_prompt_is_read(running, monkeypatch):
    monkeypatch.setattr(served.Served, "_prompt", lambda *_: pytest.fail("it was read"))
    status, told, _ = running.ask("/v1/completions", {"model": "micro", "prompt": ["a"] * 8000, "n": 128})
    assert (status, told["error"]["param"]) == (400, "n")
    assert told["error"]["message"].startswith("1024000 completions in one request")


def test_tools_and_what_a_template_makes_of_messages_are_measured_before_they_are_tokenised(running, monkeypatch):
    tokenizer = running.served.tokenizer
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenised"))
    status, told, _ = running.ask("/v1/chat/completions", chat(tools=[TOOL]))
    assert (status, told["error"]["param"], told["error"]["code"]) == (400, "tools", "context_length_exceeded")
    monkeypatch.setattr(tokenizer, "chat_template", "{% for i in range(20000) %}{{ messages[0].content }}{% endfor %}")
    status, told, _ = running.ask("/v1/chat/completions", chat())
    assert (status, told["error"]["param"], told["error"]["code"]) == (400, "messages", "context_length_exceeded")
    many = [{"role": "user", "content": ""}] * 1000
    assert running.ask("/v1/chat/completions", chat(messages=many))[1]["error"]["code"] == "context_length_exceeded"


def test_the_first_fault_ends_the_reading():
    for name in ("messages", "tools"):
        with pytest.raises(ValidationError) as refused:
            ChatAsked.model_validate(chat(**{name: [1] * 1000}))
        assert refused.value.error_count() == 1


def test_half_a_character_in_the_arguments_of_a_call_is_no_fault_of_the_server(running, monkeypatch):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "\\ud83d"}'}}
    shows = "2{{ messages[0].tool_calls[0].function.arguments.x }}"
    monkeypatch.setattr(running.served.tokenizer, "chat_template", shows)
    asked = chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert running.ask("/v1/chat/completions", asked)[0] == 200


def test_the_newest_connection_takes_the_place_of_one_that_waits(running, monkeypatch):
    monkeypatch.setattr(connections, "most_connections", lambda: (4, 10))
    waiting = []
    for _ in range(4):
        waiting.append(opened(running.address))
        time.sleep(0.02)
    assert running.complete("1", max_tokens=1)["choices"]
    assert is_closed(waiting[0])
    asking = [half(running.address) for _ in range(4)]
    until(lambda: all(is_closed(one) for one in waiting[1:]))
    with opened(running.address) as last:
        status, error = answer(last)
    assert (status, error["type"]) == (503, "server_error")
    for one in asking:
        one.close()
    until(lambda: running.ask("/health")[0] == 200)


def test_there_are_fewer_connections_than_files(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (96, 4096))
    assert most_connections() == (32, 9)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert most_connections() == (512, 128)


@contextmanager
def serving(asgi):
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(settings(asgi, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def test_a_client_that_reads_nothing_is_left(monkeypatch):
    monkeypatch.setattr(connections, "UNREAD_S", 0.2)

    ended = threading.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not ended.is_set():
            await send({"type": "http.response.body", "body": b" " * 65536, "more_body": True})
            await asyncio.sleep(0)

    with serving(endless) as address, opened(address, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") as connection:
        time.sleep(0.6)  # what was sent until then is read below, and nothing follows it
        closed = any(is_closed(connection, 1 << 20) for _ in range(500))
        ended.set()
        assert closed


def test_at_the_end_of_the_grace_period_requests_get_an_error(model, monkeypatch, capfd):
    forward = Decoding.decode_round

    def slowly(self):
        time.sleep(0.05)
        forward(self)

    monkeypatch.setattr(Decoding, "decode_round", slowly)
    server = Running(model, shutdown_s=0.2, max_batch_size=2, **{"rollout.draft_tokens": 0})
    asked = [server.begins({"stream": False}), server.begins({"stream": True}), half(server.address)]
    until(lambda: server.batcher.rows == 2)
    server.end()
    status, error = answer(asked[0])
    assert (status, error["type"]) == (503, "server_error")
    stream = http.client.HTTPResponse(asked[1])
    stream.begin()
    *_, last = stream.read().decode().strip().split("\n\n")
    assert "the server ends" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert answer(asked[2])[0] == 503
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_comes_after_the_end_is_told_so(model):
    server, told = Running(model), []
    server.end()
    server.batcher.submit([Request(None, None, told.append)])
    assert "has ended" in told[0].error


def test_what_becomes_of_tools_is_said_once(running, capsys):
    served._say_what_becomes_of_tools.cache_clear()
    for _ in range(2):
        small = {"type": "function", "function": {"name": "f"}}
        assert running.ask("/v1/chat/completions", chat(tools=[small]))[0] == 200
    assert capsys.readouterr().err.count("calls in an answer stay text") == 1
