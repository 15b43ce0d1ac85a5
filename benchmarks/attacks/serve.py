"""Does `quartet serve` stand requests that are made to harm it? What does each of them cost it?

Every attack gets a server of its own, with a tiny random policy. A row has the seconds until the attack is answered or
given up, the longest that `/health` did not answer meanwhile, the most memory that the server needed beyond what it had
before, what it wrote to its standard error, and what the attacker got. Run it in the tree that is to be attacked.

    python benchmarks/attacks/serve.py            # all of them, some five minutes; on Linux
    python benchmarks/attacks/serve.py keys ends  # those whose names have one of these words
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (HERE, HERE.parent)]

from policies.presets import PRESETS, build  # noqa: E402
from rewards.data.word_problems import word_problems  # noqa: E402

CHAT = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
GIVE_UP_S, HALF_OPEN, FILES = 150.0, 300, 96  # seconds, connections, and the files that a server may open


class Server:
    """`quartet serve` in a process of its own, and somebody who asks for its health all the time."""

    def __init__(self, model: str, files: int | None = None) -> None:
        command = [sys.executable, "-m", "grpo", "serve", model, "--port", "0", "--name", "tiny", "--threads", "1"]
        limit = f"ulimit -n {files}; " if files else ""
        shell = ["bash", "-c", f"{limit}exec {shlex.join(command)}"]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - it ends with this object
        self.process = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self.address = said.partition("http://")[2].partition("/")[0]
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # VmHWM begins anew
        self.before, self.silence, self.since, self.ends = self.memory("VmRSS"), 0.0, time.monotonic(), False
        threading.Thread(target=self._watch, daemon=True).start()

    def memory(self, kind: str) -> int:
        """In MiB; `kind` is VmRSS, what it has now, or VmHWM, the most that it has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{kind}:")[2].split()[0]) >> 10

    def _watch(self) -> None:
        while not self.ends:
            self.since = time.monotonic()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{self.address}/health", timeout=GIVE_UP_S).read()
            self.silence = self.longest_silence()
            time.sleep(0.05)

    def longest_silence(self) -> float:
        return max(self.silence, time.monotonic() - self.since)

    def connect(self, path: str, body: bytes, missing: int = 0) -> socket.socket:
        """A request; `missing` bytes of its body are not sent."""
        host, port = self.address.split(":")
        sent = socket.create_connection((host, int(port)), timeout=GIVE_UP_S)
        about = f"Host: {self.address}\r\nContent-Type: application/json\r\nContent-Length: {len(body) + missing}"
        sent.sendall(f"POST {path} HTTP/1.1\r\n{about}\r\n\r\n".encode() + body)
        return sent

    def ask(self, body: str | dict[str, Any]) -> str:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return shown(self.connect(path, (body if isinstance(body, str) else json.dumps(body)).encode()))


def shown(sent: socket.socket) -> str:
    """The status of an answer, and what it says of an error; streams have it in their last event."""
    answer = b""
    with contextlib.suppress(OSError):
        while part := sent.recv(1 << 16):
            answer += part
            length = re.search(rb"content-length: (\d+)", answer.lower())
            if length and len(answer.partition(b"\r\n\r\n")[2]) >= int(length[1]):
                break
    said = re.search(rb'"message": ?"(.{0,60})', answer)
    return f"{answer[9:12].decode() or 'closed'} {said[1].decode() if said else ''}".strip()


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "2 + 3 = ", "max_tokens": 8, "seed": 1} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "2 + 3"}], "max_tokens": 8} | fields


def half_open(server: Server) -> str:
    """Half a head on each connection; then somebody asks as one should."""
    host, port = server.address.split(":")
    opened = [socket.create_connection((host, int(port)), timeout=5) for _ in range(HALF_OPEN)]
    for one in opened:
        with contextlib.suppress(ConnectionError):
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
    answer, left, deadline = server.ask(asked()), len(opened), time.monotonic() + 30
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        left = sum(not is_closed(one) for one in opened)
    return f"a good request {answer}; {left} of {len(opened)} still open"


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def held_bodies(server: Server) -> str:
    """Bodies that never end."""
    held = []
    for _ in range(40):
        with contextlib.suppress(ConnectionError):
            held.append(server.connect("/v1/completions", b" " * 4_000_000, missing=1))
    return f"a good request {server.ask(asked())}"


def ends(server: Server) -> str:
    """SIGTERM while two requests run that do not end in time."""
    body = asked(n=64, max_tokens=4000, temperature=1.0)
    running = [server.connect("/v1/completions", json.dumps(body | {"stream": s}).encode()) for s in (False, True)]
    time.sleep(1)
    server.process.terminate()
    return "; as a stream ".join(map(shown, running))


KEYS = ",".join(f'"key{i}": 1' for i in range(14_000)) + ',"key13999": 1'
TOOL = {"type": "function", "function": {"name": "f", "description": "word " * 600_000}}
EMPTY = {"role": "user", "content": ""}
ATTACKS: dict[str, Callable[[Server], str]] = {
    "a good request": lambda server: server.ask(asked()),
    "8,000 prompts with n=128 (40 KB)": lambda server: server.ask(asked(prompt=["a"] * 8000, n=128)),
    "14,000 keys, one of them twice (209 KB)": lambda server: server.ask(f"{{{KEYS}}}"),
    "tools of 15 MB": lambda server: server.ask(chat(tools=[TOOL] * 5)),
    "tools of 3 MB": lambda server: server.ask(chat(tools=[TOOL])),
    "unknown fields (4 MB)": lambda server: server.ask(asked(**{f"key{i}": 1 for i in range(250_000)})),
    "wrong messages (4 MB)": lambda server: server.ask(chat(messages=[1] * 1_300_000)),
    "empty messages (4 MB)": lambda server: server.ask(chat(messages=[EMPTY] * 100_000)),
    "a million empty lists (4 MB)": lambda server: server.ask(asked(prompt=[[]] * 1_000_000)),
    "temperature 1e-300": lambda server: server.ask(asked(temperature=1e-300)),
    f"{HALF_OPEN} half-open connections": half_open,
    f"the same with {FILES} files": half_open,
    "40 bodies of 4 MB that never end": held_bodies,
    "SIGTERM, and the grace period ends": ends,
}


def main() -> None:
    PRESETS["small"] = PRESETS["tiny"] | {"max_position_embeddings": 4096}
    problems = [row["question"] for row in word_problems("train", [1], count=200)]
    print("| attack | seconds | /health silent | memory | stderr | answer |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        policy = build("small", problems, 3)
        policy.tokenizer.chat_template = CHAT
        policy.save(folder)
        for name, attack in ATTACKS.items():
            if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
                continue
            server = Server(folder, FILES if "files" in name else None)
            start = time.monotonic()
            answer = attack(server)
            seconds, silence, server.ends = time.monotonic() - start, server.longest_silence(), True
            memory = server.memory("VmHWM") - server.before if server.process.poll() is None else 0
            server.process.kill()
            server.process.wait()
            written = server.errors.seek(0, 2)
            row = f"{seconds:.1f} s | {silence:.1f} s | +{memory} MiB | {written:,} B"
            print(f"| {name} | {row} | {answer} |", flush=True)


if __name__ == "__main__":
    main()
