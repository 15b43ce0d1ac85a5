"""Does `quartet serve` stand requests that are made to harm it? What does each of them cost it?

Every attack gets a server of its own, with a tiny random policy. A row has the seconds until the attack is answered or
given up, the longest that `/health` did not answer meanwhile, the memory that the server needed above its own before,
what it wrote to its standard error, and what the attacker got. Run it in the tree that is to be attacked.

    python benchmarks/attacks/serve.py            # all of them, some three minutes
    python benchmarks/attacks/serve.py keys ends  # those whose names have one of these words
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (HERE, HERE.parent)]

from grpo.data.word_problems import word_problems  # noqa: E402
from policies.presets import PRESETS, build  # noqa: E402

CHAT = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
GIVE_UP_S, HALF_OPEN, FILES = 150.0, 300, 96


class Server:
    """`quartet serve` in a process of its own, and somebody who asks for its health all the time."""

    def __init__(self, model: str, files: int | None = None) -> None:
        self.errors = tempfile.TemporaryFile()
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        command = [sys.executable, "-m", "grpo", "serve", model, "--port", "0", "--name", "tiny", "--threads", "1"]
        command += ["--shutdown_s", "2"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.errors, text=True, preexec_fn=limit
        )
        said = re.search(r"http://(([^:]+):(\d+))/v1", self.process.stdout.readline())  # type: ignore[union-attr]
        self.address, self.place = said[1], (said[2], int(said[3]))  # type: ignore[index]
        self.silence, self.peak, self.before, self.ends = 0.0, 0, self._memory(), False
        self.waits_since: float | None = None
        self.watchers = [threading.Thread(target=watch) for watch in (self._watch_health, self._watch_memory)]
        for watcher in self.watchers:
            watcher.start()

    def _memory(self) -> int:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).memory_info().rss
        return 0

    def _watch_memory(self) -> None:
        while not self.ends:
            self.peak = max(self.peak, self._memory())
            time.sleep(0.02)

    def _watch_health(self) -> None:
        while not self.ends:
            self.waits_since = time.monotonic()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{self.address}/health", timeout=GIVE_UP_S).read()
            self.silence, self.waits_since = self.longest_silence(), None
            time.sleep(0.05)

    def longest_silence(self) -> float:
        """With the one that has not ended."""
        since = self.waits_since
        return self.silence if since is None else max(self.silence, time.monotonic() - since)

    def connect(self, head: str = "", body: bytes = b"", length: int | None = None) -> socket.socket:
        sent = socket.create_connection(self.place, timeout=GIVE_UP_S)
        about = f"Host: {self.address}\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n"
        sent.sendall((f"POST {head} HTTP/1.1\r\n{about}\r\n" if head else "").encode() + body)
        return sent

    def ask(self, body: bytes | dict[str, Any], path: str = "/v1/completions") -> str:
        sent = self.connect(path, json.dumps(body).encode() if isinstance(body, dict) else body)
        return shown(read(sent))

    def end(self) -> int:
        """The bytes of its standard error."""
        self.ends = True
        self.process.kill()
        self.process.wait()
        for watcher in self.watchers:
            watcher.join()
        return self.errors.seek(0, 2)


def read(sent: socket.socket) -> bytes:
    """Until the answer is complete, as its first line and length say, or the server closes."""
    found = b""
    with contextlib.suppress(OSError):
        while part := sent.recv(1 << 16):
            found += part
            head, _, body = found.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if length and len(body) >= int(length[1]):
                break
    return found


def shown(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, message = head[9:12].decode() or "closed", re.search(rb'"message": ?"(.{0,60})', body)
    return f"{status} {message[1].decode() if message else body[-60:].decode(errors='replace')!r}"


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "2 + 3 = ", "max_tokens": 8, "seed": 1} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "2 + 3"}], "max_tokens": 8, "seed": 1} | fields


def half_open(server: Server) -> str:
    """Half a head on each connection; then somebody asks as one should."""
    opened = []
    for _ in range(HALF_OPEN):
        with contextlib.suppress(OSError):
            opened.append(socket.create_connection(server.place, timeout=5))
            opened[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
    answer, deadline, left = server.ask(asked()), time.monotonic() + 30, set(opened)
    while left and time.monotonic() < deadline:
        for one in list(left):
            one.settimeout(0.001)
            with contextlib.suppress(TimeoutError), contextlib.suppress(ConnectionError):
                while one.recv(4096):
                    pass
                left.discard(one)
        time.sleep(0.2)
    return f"{len(left)} of {len(opened)} still open after 30 s; a good request: {answer[:3]}"


def held_bodies(server: Server) -> str:
    """Bodies that never end, as large as they may be."""
    for _ in range(40):
        with contextlib.suppress(OSError):
            held.append(server.connect("/v1/completions", b" " * 4_000_000, 4_000_001))
    return f"a good request: {server.ask(asked())[:3]}"


def does_not_read(server: Server) -> str:
    """Long streams, which nobody reads."""
    body = json.dumps(asked(n=32, max_tokens=2000, logprobs=0, stream=True, stop=["never"])).encode()
    streams = [server.connect("/v1/completions", body) for _ in range(4)]
    time.sleep(1)
    return f"{len(streams)} streams; a good request: {server.ask(asked())[:3]}"


def ends(server: Server) -> str:
    """SIGTERM while two requests run that do not end in time."""
    long = asked(n=64, max_tokens=4000, temperature=1.0)
    one, two = (server.connect("/v1/completions", json.dumps(long | {"stream": s}).encode()) for s in (False, True))
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    return f"whole {shown(read(one))}; stream {shown(b'HTTP/1.1 200' + bytes(4) + read(two)[-150:])}"


held: list[socket.socket] = []
KEYS = ",".join(f'"key{i}": 1' for i in range(14_000)) + ',"key13999": 1'
EMPTY = {"role": "user", "content": ""}
TOOL = {"type": "function", "function": {"name": "f", "description": "word " * 600_000}}
ATTACKS: dict[str, Any] = {
    "a good request": lambda s: s.ask(asked()),
    "8,000 prompts x n=128 (40 KB)": lambda s: s.ask(asked(prompt=["a"] * 8000, n=128)),
    "14,000 keys, one of them twice (209 KB)": lambda s: s.ask(f"{{{KEYS}}}".encode()),
    "tools of 15 MB": lambda s: s.ask(chat(tools=[TOOL] * 5), "/v1/chat/completions"),
    "tools of 3 MB": lambda s: s.ask(chat(tools=[TOOL]), "/v1/chat/completions"),
    "unknown fields (4 MB)": lambda s: s.ask(asked(**{f"key{i}": 1 for i in range(250_000)})),
    "wrong messages (4 MB)": lambda s: s.ask(chat(messages=[1] * 1_300_000), "/v1/chat/completions"),
    "empty messages (4 MB)": lambda s: s.ask(chat(messages=[EMPTY] * 110_000), "/v1/chat/completions"),
    "lists in lists (4 MB)": lambda s: s.ask(asked(prompt=[[]] * 1_000_000)),
    "lists in lists (16 MB)": lambda s: s.ask(asked(prompt=[[]] * 4_000_000)),
    "temperature 1e-300": lambda s: s.ask(asked(temperature=1e-300)),
    f"{HALF_OPEN} half-open connections": half_open,
    f"the same with {FILES} files": half_open,
    "40 bodies of 4 MB that never end": held_bodies,
    "streams that nobody reads": does_not_read,
    "SIGTERM, and the grace period ends": ends,
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        PRESETS["small"] = PRESETS["tiny"] | {"max_position_embeddings": 4096}
        policy = build(
            "small", [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=200)], 3
        )
        policy.tokenizer.chat_template = CHAT
        policy.save(folder)
        print("| attack | seconds | /health silent | memory | stderr | answer |\n|---|---|---|---|---|---|")
        for name, attack in ATTACKS.items():
            if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
                continue
            server, start = Server(folder, FILES if "files" in name else None), time.monotonic()
            answer = attack(server)
            seconds, silence = time.monotonic() - start, server.longest_silence()
            grown = (server.peak - server.before) >> 20
            cells = [name, f"{seconds:.1f}", f"{silence:.1f} s", f"+{grown} MiB", f"{server.end()} B", answer]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
