"""Does `quartet serve` stand 10,000 requests, most of them from clients that do not behave?

Clients vanish while they are answered or before, send half a body, a megabyte, what is no JSON, a wrong key, another
model, or fields that nobody understands; every fifth one asks as it should. Looked at are: whether every answer has
OpenAI's form, and a good request the tokens that it gets from an idle server; how much memory, files and threads the
server has after a fifth of the requests and at the end; rows that are still decoded then; and how it ends at SIGTERM.

    python benchmarks/strangers.py runs/demo --json benchmarks/results/strangers.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

from grpo.run.hardware import describe  # noqa: E402

KEY = "a key of the benchmark"
GOOD = {"model": "served", "prompt": "Tom has 3 apples and buys 4 more.\n", "max_tokens": 12}
SEEDS = 4
QUIET_S = 30.0  # in which what vanished clients asked for must be given up


class Strangers:
    """Every method is a client; it returns the status that it got, or what it did instead of waiting for one."""

    def __init__(self, address: str) -> None:
        self.host, port = address.rsplit(":", 1)
        self.port = int(port)
        self.expected: dict[int, str] = {}

    def ask(self, body: bytes | dict[str, Any], path: str = "/v1/completions", key: str = KEY, **headers: str) -> int:
        """Raises ValueError where the answer has not OpenAI's form."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            given = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"} | headers
            connection.request("POST", path, data, given)
            answer = connection.getresponse()
            said = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status == 200:
            self.answer = said
            return self._right(body, said)
        error = said["error"]
        if not (isinstance(error["message"], str) and error["message"] and {"type", "param", "code"} <= error.keys()):
            raise ValueError(f"status {answer.status} without OpenAI's form: {said}")
        return answer.status

    def _right(self, body: Any, said: dict[str, Any]) -> int:
        seed, text = body["seed"], said["choices"][0]["text"]
        if self.expected.setdefault(seed, text) != text:
            raise ValueError(f"seed {seed} gives {text!r}, and gave {self.expected[seed]!r} before")
        return 200

    def _sent(self, length: int, data: bytes) -> socket.socket:
        sent = socket.create_connection((self.host, self.port), timeout=30)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Length: {length}\r\n\r\n"
        )
        sent.sendall(head.encode() + data)
        return sent

    def good(self, draw: random.Random) -> Any:
        return self.ask(GOOD | {"seed": draw.randrange(SEEDS)})

    def vanishes_before_an_answer(self, draw: random.Random) -> Any:
        data = json.dumps(GOOD | {"max_tokens": 200, "seed": 1, "stop": ["never"]}).encode()
        self._sent(len(data), data).close()
        return "left"

    def vanishes_in_the_middle(self, draw: random.Random) -> Any:
        data = json.dumps(GOOD | {"max_tokens": 200, "seed": 1, "stream": True, "n": 2}).encode()
        with self._sent(len(data), data) as sent:
            sent.recv(draw.choice([1, 100, 1000]))
        return "left"

    def half_a_body(self, draw: random.Random) -> Any:
        data = json.dumps(GOOD).encode()
        self._sent(len(data), data[: draw.randrange(len(data))]).close()
        return "left"

    def a_megabyte(self, draw: random.Random) -> Any:
        return self.ask(GOOD | {"prompt": "apples " * 150_000, "seed": 1})

    def no_json(self, draw: random.Random) -> Any:
        bodies = [
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"model": "served"',
            draw.randbytes(300),
            b"[" * 100_000,
            b'"\xed\xa0\x80"',
        ]
        return self.ask(draw.choice(bodies))

    def a_wrong_key(self, draw: random.Random) -> Any:
        return self.ask(GOOD | {"seed": 1}, key=draw.choice(["", "another key", "\xe9" * 8, KEY + "x"]))

    def a_wrong_place(self, draw: random.Random) -> Any:
        places = ["/v1/embeddings", "/v1/models/other", "/", "/v1/../etc/passwd", "/v1/chat/completions/"]
        return self.ask(GOOD, path=draw.choice(places))

    def wrong_fields(self, draw: random.Random) -> Any:
        wrong: list[dict[str, Any]] = [
            {"model": "another"},
            {"prompt": 7},
            {"prompt": [10**12]},
            {"prompt": []},
            {"max_tokens": -1},
            {"max_tokens": 10**9},
            {"n": 10**6},
            {"temperature": "hot"},
            {"temperature": -1.0},
            {"top_p": 0.5},
            {"seed": 1.5},
            {"stream": "yes"},
            {"stop": [""] * 99},
            {"what": "is this"},
            {"logprobs": 5},
        ]
        return self.ask(GOOD | draw.choice(wrong))


KINDS = [name for name in vars(Strangers) if not name.startswith("_") and name not in ("ask", "good")]


def state(process: psutil.Process, address: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    lines = connection.getresponse().read().decode().splitlines()
    counts = {re.split("[{ ]", line)[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    return {
        "rss_mib": process.memory_info().rss / 2**20,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        **{name: counts[f"quartet_{name}"] for name in ("rows", "waiting", "completions", "cancelled", "failed")},
    }


def measured(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w") as key:
        key.write(KEY)
        key.flush()
        command = [sys.executable, "-m", "grpo", "serve", args.model, "--port", "0", "--name", "served"]
        command += ["--api_key_file", key.name, "--threads", "1"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        said = server.stdout.readline()
    address = re.search(r"at http://(\S+)/v1", said)[1]  # type: ignore[index]
    process, clients = psutil.Process(server.pid), Strangers(address)
    for seed in range(SEEDS):  # from an idle server
        assert clients.ask(GOOD | {"seed": seed}) == 200
    found: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []

    def one(number: int) -> None:
        draw = random.Random(number)
        kind = "good" if number % 5 == 0 else draw.choice(KINDS)
        client: Callable[[random.Random], Any] = getattr(clients, kind)
        try:
            status = str(client(draw))
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            status = "WRONG"
            wrong.append(f"{kind}, request {number}: {type(error).__name__}: {error}"[:500])
        found[kind, status] += 1

    began, states = time.perf_counter(), {}
    with ThreadPoolExecutor(args.clients) as threads:
        for name, part in (("early", range(args.requests // 5)), ("late", range(args.requests // 5, args.requests))):
            list(threads.map(one, part))
            states[name] = settled(process, address)
            print(f"after {part.stop} requests: {states[name]}", flush=True)
    seconds = time.perf_counter() - began
    server.terminate()
    return {
        "requests": args.requests,
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "answers": {kind: {s: n for (k, s), n in sorted(found.items()) if k == kind} for kind in ["good", *KINDS]},
        "wrong": wrong,
        "server": states,
        "exit_code": server.wait(60),
        "environment": describe() | {"command": "python benchmarks/strangers.py RUN"},
    }


def settled(process: psutil.Process, address: str) -> dict[str, Any]:
    """Once nothing is decoded any more, or after QUIET_S."""
    end = time.monotonic() + QUIET_S
    while (now := state(process, address))["rows"] + now["waiting"] and time.monotonic() < end:
        time.sleep(0.2)
    return now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measured(args)
    print(json.dumps({name: value for name, value in found.items() if name != "environment"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return len(found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
