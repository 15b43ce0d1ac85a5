"""Attacks on `quartet view`: by a run folder that a stranger made, and by what may be asked of the page.

Each attack has a folder and a server of its own, which may take 3 GiB. Run it as `python -m benchmarks.attacks.view`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from rewards.records import read_rollouts, rollout_path

RECORDED = Path(__file__).parents[2] / "tests/cases/run_to_view"
WAIT_S, MEMORY = 20, 3 * 2**30
HALF = 96  # a token that begins a character and does not end it


def rewrite(folder: Path, **changed: object) -> None:
    lines = "".join(json.dumps(line | changed) + "\n" for line in read_rollouts(RECORDED, 4))
    rollout_path(folder, 4).write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


def replace(path: Path, put: Callable[[Path], object]) -> None:
    path.unlink()
    put(path)


def bomb(path: Path) -> None:
    """Two GiB of blanks in some 64 KiB."""
    with zstandard.ZstdCompressor().stream_writer(path.open("wb"), size=2**31) as writer:
        for _ in range(2**7):
            writer.write(b" " * 2**24)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def growing(folder: Path) -> None:
    path = folder / "warm_start/tokenizer.json"
    more = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    decoder = {"type": "Sequence", "decoders": [more] * 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": decoder}))


# [what is done, to the folder, what is asked]
ATTACKS: list[tuple[str, Callable[[Path], object], str]] = [
    ("record is a link to /dev/zero", lambda f: replace(rollout_path(f, 4), endless), "0/step/4"),
    ("record of 64 KiB unpacks to 2 GiB", lambda f: replace(rollout_path(f, 4), bomb), "0/step/4"),
    ("events.jsonl is a pipe", lambda f: replace(f / "events.jsonl", os.mkfifo), "0/overview"),
    ("metrics.jsonl of 1 GiB", lambda f: os.truncate(f / "metrics.jsonl", 2**30), "0/overview"),
    ("finish_reason is an object", lambda f: rewrite(f, finish_reason={}), "0/step/4"),
    ("record of 64 KiB unpacks to 2 GiB, sought in", lambda f: replace(rollout_path(f, 4), bomb), "0/places?prompt=a"),
    ("draft is a list", lambda f: rewrite(f, draft=[1]), "0/group/4/0"),
    ("8,000 bytes that are no character", lambda f: rewrite(f, token_ids=[HALF] * 8000), "0/group/4/0"),
    ("tokenizer that makes 10^16 letters of one", growing, "0/group/4/0"),
    ("path traversal", lambda _: None, "../assets/..%2f..%2f..%2fserver.py"),
]  # fmt: skip


def attack(prepare: Callable[[Path], object], path: str, place: Path) -> tuple[str, ...]:
    """Seconds, seconds of /api/runs meanwhile, MiB, seconds of Ctrl-C, the answer."""
    folder = place / "run"
    shutil.copytree(RECORDED, folder)
    prepare(folder)
    command = [sys.executable, "-m", "grpo", "view", str(folder)]
    limits = lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # noqa: E731
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **pipes, text=True, preexec_fn=limits)
    address, token = re.search(r"open (\S+)/\?token=(\S+)", process.stdout.readline()).groups()  # type: ignore

    def ask(path: str) -> tuple[float, str]:
        began = time.monotonic()
        request = urllib.request.Request(f"{address}/api/{path}", headers={"x-token": token})
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as response:
                answer = f"{response.status} {response.read()[:100].decode()}"
        except urllib.error.HTTPError as error:
            answer = f"{error.code} {error.read()[:170].decode()}"
        except OSError as error:
            answer = f"none: {error}"
        return time.monotonic() - began, answer.replace(str(place), "")

    answers: list[tuple[float, str]] = []
    thread = threading.Thread(target=lambda: answers.append(ask(path)))
    thread.start()
    time.sleep(0.3)
    meanwhile = ask("runs")
    thread.join()
    status = Path(f"/proc/{process.pid}/status").read_text()
    memory = re.search(r"VmHWM:\s+(\d+)", status)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        process.wait(WAIT_S)
        end = f"{time.monotonic() - began:.1f}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        end = "never"
    seconds, answer = answers[0]
    waited = f"{meanwhile[0]:.1f}" if meanwhile[1].startswith("200") else "none"
    return f"{seconds:.1f}", waited, f"{int(memory[1]) / 1024:.0f}" if memory else "died", end, answer


def main() -> None:
    print("| attack | answer, s | page meanwhile, s | peak memory, MiB | Ctrl-C, s | answer |\n" + "|---" * 6 + "|")
    for name, prepare, path in ATTACKS:
        with tempfile.TemporaryDirectory() as place:
            print(f"| {name} | {' | '.join(attack(prepare, path, Path(place)))} |", flush=True)


if __name__ == "__main__":
    main()
