"""A server in a thread of the test's process, and what asks it."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import uvicorn

from grpo.cli.config.serve import ServeConfig
from grpo.cli.serve.server import begin_serving
from grpo.endpoint.connections import settings
from rewards.config.options import load
from rewards.listening import listen


class Running:
    """A server in a thread of this process."""

    def __init__(self, model: str, *, shutdown_s: int = 10, **given: Any) -> None:
        options = {"model": model, "threads": 1, "rollout.draft_tokens": 2, "rollout.max_completion_tokens": 40} | given
        self.application, self.served = begin_serving(load(ServeConfig, None, options))
        self.socket, self.address = listen("127.0.0.1", 0)
        self.server = uvicorn.Server(settings(self.application, lifespan="on", timeout_graceful_shutdown=shutdown_s))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    @property
    def batcher(self):
        return self.served.batcher

    def ask(self, path: str, body=None, headers=None) -> tuple[int, dict, dict]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read()), dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), dict(error.headers)

    def complete(self, prompt, **given) -> dict:
        status, answer, _ = self.ask("/v1/completions", {"model": "micro", "prompt": prompt, "seed": 1} | given)
        assert status == 200, answer
        return answer

    def stream(self, path: str, body: dict) -> list[dict]:
        data = json.dumps({"model": "micro", "seed": 1, "stream": True} | body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            events = response.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def begins(self, body: dict) -> socket.socket:
        """A request whose answer nobody reads yet."""
        data = json.dumps({"model": "micro", "prompt": "2 + 3", "max_tokens": 200, "seed": 2} | body).encode()
        sent = socket.create_connection(self.address.split(":"))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.address}\r\nContent-Type: application/json\r\n"
        sent.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return sent

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()


def until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
