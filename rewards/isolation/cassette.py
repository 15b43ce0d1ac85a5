"""A cassette: what judges, tools and MCP servers have answered, in a file, so that a run repeats offline.

The same request has the same answer, whoever asks, in any order: a request is known by the digest of its kind, its
target and its content. An episode's request names its step, draw, prompt, sample and turn. Each line of the file is the
answer to one request, or to the next try of it. Keys and tokens are sent in headers, and these are not in it.

The processes of a run find the cassette by an environment variable.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rewards.protocol import RewardError

VARIABLE = "QUARTET_CASSETTE"
FAULTS = {
    "rate_limited": "HTTP 429 Too Many Requests",
    "late": "no answer in time",
    "cut": "half an answer",
    "twice": "two answers in one",
}
LONGEST = 200  # characters of a request in the file and in messages


class Cassette:
    """The file. With `mode` replay it answers all, and with record it keeps what it does not know. `faults` are the
    shares of tries that meet each of FAULTS, in both modes; the file has the answers without them."""

    def __init__(self, file: str, mode: str, faults: Mapping[str, float]) -> None:
        self.file, self.records, self.faults = Path(file), mode == "record", faults
        self._answers: dict[str, list[Any]] = {}
        self._size = 0  # bytes that were read
        self._lock = threading.Lock()  # of the threads of this process

    def answers(self, key: str) -> list[Any]:
        with self._lock:
            self._read()
            return list(self._answers.get(key, ()))

    def keep(self, key: str, place: int, about: dict[str, Any], answer: Any) -> Any:
        """Adds an answer as the one at this place, and returns it: another process may have been first with its own."""
        import fcntl  # not on Windows

        with self._lock, open(self.file, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._read()
            if len(self._answers.get(key, ())) <= place:
                file.truncate(self._size)
                file.write(json.dumps({"key": key, **about, "answer": answer}).encode() + b"\n")
                file.flush()
                self._read()
            return self._answers[key][place]

    def _read(self) -> None:
        """Read what has been added. Raises RewardError for a damaged line."""
        if not self.file.exists() or self.file.stat().st_size == self._size:
            return
        with open(self.file, "rb") as file:
            file.seek(self._size)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written, or who wrote it was killed
                    return
                try:
                    record = json.loads(line)
                    self._answers.setdefault(record["key"], []).append(record["answer"])
                except (ValueError, KeyError, TypeError) as error:
                    damaged = f"cassette.file={self.file}: a line is damaged, {line[:80]!r}; record it anew"
                    raise RewardError(damaged) from error
                self._size += len(line)


class Exchange:
    """One request to something outside, and its tries, with the cassette of the run. Without one it changes nothing."""

    def __init__(self, kind: str, target: str, content: Any) -> None:
        text = os.environ.get(VARIABLE)
        self.cassette = _opened(text) if text else None
        self._tries = self._place = 0
        if self.cassette is not None:
            self._content = json.dumps(content, sort_keys=True)
            key = hashlib.blake2b(json.dumps([kind, target, self._content]).encode(), digest_size=16)
            self._key = key.hexdigest()
            self._about = {"kind": kind, "target": target, "request": self._content[:LONGEST]}

    def fault(self) -> str:
        """The name of the fault that the next try meets; empty for none. It follows from the content and the try."""
        if self.cassette is None:
            return ""
        self._tries += 1
        digest = hashlib.blake2b(f"{self._content}/{self._tries}".encode(), digest_size=8).digest()
        chance = int.from_bytes(digest, "little") / 2**64
        for name, share in self.cassette.faults.items():
            if chance < share:
                return name
            chance -= share
        return ""

    def find(self) -> Any:
        """The answer of the cassette; None where something else must be asked. A further try than those that were
        recorded has the answer of the last one. Raises RewardError for a request that is not in it, in a replay."""
        if self.cassette is None:
            return None
        answers = self.cassette.answers(self._key)
        self._place += 1
        if self.cassette.records:
            return answers[self._place - 1] if len(answers) >= self._place else None
        if not answers:
            request = "{kind} {target}: {request}".format(**self._about)
            raise RewardError(
                f"cassette.file={self.cassette.file}: it has no answer of {request}. Record it (cassette.mode=record), "
                "with the same configuration"
            )
        return answers[min(self._place, len(answers)) - 1]

    def keep(self, answer: Any) -> Any:
        """The answer to go on with: this one, once it is recorded."""
        return answer if self.cassette is None else self.cassette.keep(self._key, self._place - 1, self._about, answer)

    def answer(self, live: Callable[[], Any]) -> Any:
        """The answer of the cassette, or that of `live`, once it is recorded; it is not None, and JSON can hold it."""
        answer = self.find()
        return self.keep(live()) if answer is None else answer


def put_in(fault: str) -> str:
    """Words for a fault, which the message of a failure has.

    >>> put_in("late")
    'no answer in time (late, put in by the cassette)'
    """
    return f"{FAULTS[fault]} ({fault}, put in by the cassette)"


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Puts a function of an agent or a reward that asks something outside on the cassette of the run.

    Its arguments and its result are what JSON can hold, and it is not async. What it raises becomes a RuntimeError, and
    is recorded as well. A fault is one, too.
    """
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"recorded: {function.__name__} is async; record the plain function that it calls")

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        def live() -> dict[str, Any]:
            try:
                return {"result": function(*arguments, **options)}
            except Exception as error:
                return {"error": f"{type(error).__name__}: {error}"}

        exchange = Exchange("function", function.__qualname__, [arguments, options])
        fault = exchange.fault()
        answer = {"error": put_in(fault)} if fault else exchange.answer(live)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    return call


@functools.cache
def _opened(text: str) -> Cassette:
    return Cassette(**json.loads(text))


@contextmanager
def playing(file: Path, mode: str = "replay", faults: Mapping[str, float] = MappingProxyType({})) -> Iterator[None]:
    """This process and those that it starts use this cassette. Raises ValueError if there is none to be replayed."""
    if mode == "replay" and not file.is_file():
        raise ValueError(f"cassette.file={file}: there is no such file; record it first (cassette.mode=record)")
    before = os.environ.get(VARIABLE)
    _opened.cache_clear()  # the file may be another one by now
    os.environ[VARIABLE] = json.dumps({"file": str(file.absolute()), "mode": mode, "faults": dict(faults)})
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
