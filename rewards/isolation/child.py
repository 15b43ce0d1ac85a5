"""The child process that runs reward functions and tools: JSON lines over a socket, one answer per request.

Standard output and standard error are for the user's functions; the parent shows them. The process ends with its
parent, whatever it is doing: the thread that reads the requests sees the socket's end. A call that exceeds its time
limit is ended by faulthandler's watchdog, which needs no GIL and first writes down where the call was stuck.
"""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import json
import os
import signal
import socket
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from rewards.opened import begin_process, opened_by, this_process_is_of
from rewards.protocol import Reward, RewardError, Signature, awaited, bind
from rewards.registry import Source, load_reward


def serve(socket_fd: int, trace_fd: int, memory: int) -> None:
    """Answer requests until the parent closes the socket. `memory` is the most bytes of data, or 0 for no limit."""
    if memory:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    for fd in (socket_fd, trace_fd):
        os.set_inheritable(fd, False)
    with contextlib.suppress(OSError):  # Linux: if memory runs out, the kernel kills this process before the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection = socket.socket(fileno=socket_fd)
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, lines), daemon=True).start()
    functions: list[Any] = []
    names: list[str] = []
    begin_process()
    while True:
        request = json.loads(lines.get())
        renew = partial(faulthandler.dump_traceback_later, request["timeout_s"], exit=True, file=trace_fd)
        renew()
        try:
            if "functions" in request:
                reply = load(request["functions"], functions)
                names += [description["function"] for description in request["functions"]]
            else:
                this_process_is_of(names[request["function"]])
                reply = functions[request["function"]].call(request | {"renew": renew})
        except BaseException as error:  # KeyboardInterrupt: no Ctrl-C comes here, so the function has raised it
            reply = {"kind": "raised", "message": _describe(error, None)}
        number = {"number": request["number"]}
        try:
            encoded = json.dumps(reply | number, default=plain)
        except Exception as error:
            message = f"what it logged cannot be written as JSON: {_describe(error, None)}"
            encoded = json.dumps({"kind": "raised", "message": message} | number)
        faulthandler.cancel_dump_traceback_later()
        try:
            connection.sendall(encoded.encode() + b"\n")
        except OSError:  # the function has closed it
            os._exit(1)


def _read(connection: socket.socket, lines: SimpleQueue[bytes]) -> None:
    with contextlib.suppress(OSError):
        for line in connection.makefile("rb", buffering=1 << 20):
            lines.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # with every process that a reward has started


def load(descriptions: list[dict], functions: list[Any]) -> dict:
    """Append the functions that are described. The reply holds their signatures, or the first error."""
    for description in descriptions:
        kind = description.get("kind", "reward")
        try:
            module, _, name = KINDS.get(kind, kind).partition(":")
            arguments = {key: value for key, value in description.items() if key != "kind"}
            loaded = getattr(import_module(module), name)
            with opened_by(description["function"]):
                functions.append(loaded(**arguments))
        except RewardError as error:
            return {"error": str(error)}
        except BaseException as error:
            cause = _describe(error, description.get("path"))
            return {"error": f"{kind} {description['function']!r} cannot be loaded: {cause}"}
    return {"signatures": [asdict(function.signature) for function in functions]}


class LoadedReward:
    """A reward function with its arguments bound, which can be called on a request."""

    def __init__(
        self, function: str, attribute: str, path: str | None, content: str, arguments: Mapping[str, Any], chat: bool
    ):
        reward = load_reward(Source(function, attribute, path, content.encode("latin-1")))
        try:
            self.signature = Signature.of(reward)
            self.signature.check_arguments(function, arguments)
        except (TypeError, ValueError) as error:  # inspect: some C functions have no signature
            raise RewardError(f"reward {function!r}: {error}") from error
        self.reward: Reward = bind(reward, arguments)
        self.path, self.chat = path, chat

    def call(self, request: dict) -> dict:
        """Score one batch. Keys of the request: prompts [P], completions [P][G] (texts or messages), columns
        {name: [P]}, completion_columns {name: [P][G]}, and optionally completion_ids [P][G][L] and trainer_state."""
        counts = [len(group) for group in request["completions"]]
        completions = _flat(request["completions"])
        prompts = _repeat(request["prompts"], counts)
        if self.chat:
            prompts, completions = as_messages(prompts, "user"), as_messages(completions, "assistant")
        extras: dict[str, list] = {}
        metrics: dict[str, list[float]] = {}

        def log_extra(column: str, values: list) -> None:
            values = list(values)
            if len(values) != len(completions):
                raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(completions)} completions")
            extras[column] = values

        def log_metric(name: str, value: float) -> None:
            metrics.setdefault(name, []).append(float(value))

        provided: dict[str, Any] = {"prompts": prompts, "completions": completions}
        provided |= {"log_extra": log_extra, "log_metric": log_metric}
        if "completion_ids" in request:
            provided["completion_ids"] = _flat(request["completion_ids"])
        if "trainer_state" in request:
            provided["trainer_state"] = SimpleNamespace(**request["trainer_state"])
        arguments = {name: value for name, value in provided.items() if self.signature.asks_for(name)}
        arguments |= {name: _repeat(values, counts) for name, values in request["columns"].items()}
        arguments |= {name: _flat(values) for name, values in request["completion_columns"].items()}
        try:
            result = _value_of(self.reward(**arguments))
            if not hasattr(result, "__iter__") or isinstance(result, str | bytes | Mapping):
                message = f"returned {repr(result)[:80]}, not a list of {len(completions)}"
                return {"kind": "wrong_length", "message": message}
            rewards = [_number(value) for value in result]
        except KeyboardInterrupt:  # Ctrl-C, if this is the user's own process
            raise
        except BaseException as error:  # also SystemExit, since a reward must not end the worker
            hint = "" if self.chat else _expects_messages(error)
            return {"kind": "raised", "message": _describe(error, self.path) + hint}
        if len(rewards) != len(completions):
            message = f"returned {len(rewards)} rewards for {len(completions)} completions"
            return {"kind": "wrong_length", "message": message}
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        return {"rewards": rewards, "extras": extras, "metrics": means}


KINDS = {
    "reward": "rewards.isolation.child:LoadedReward",
    "environments": "rewards.isolation.environments:LoadedEnvironments",
    "agent": "rewards.isolation.agents:LoadedAgent",
    "template": "rewards.isolation.templates:LoadedTemplate",
}


def _value_of(result: object) -> object:
    """The result of a function, sync or async. Where an event loop runs, as in a notebook, another thread waits."""
    if not inspect.isawaitable(result):
        return result
    import asyncio  # takes a third of the start of a process, and few functions are async
    from concurrent.futures import ThreadPoolExecutor

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited(result))
    elsewhere = ThreadPoolExecutor(1)
    try:
        return elsewhere.submit(asyncio.run, awaited(result)).result()
    finally:
        elsewhere.shutdown(wait=False)  # Ctrl-C leaves one that hangs


def _repeat(values: list, counts: list[int]) -> list:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]


def as_messages(texts: list, role: str) -> list:
    return [[{"role": role, "content": text}] if isinstance(text, str) else text for text in texts]


def _flat(groups: list[list]) -> list:
    return [value for group in groups for value in group]


def _number(value: object) -> float | dict | None:
    """A float for any number (int, bool, numpy or torch scalar), None for None, or else a failure."""
    if value is None:
        return None
    if isinstance(value, Exception):
        return {"kind": "raised", "message": _describe(value.with_traceback(None), None)}
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if hasattr(value, "__float__"):
            return float(value)
    return {"kind": "not_a_number", "message": f"returned {value!r:.80}"}


def plain(value: object) -> object:
    """A form that JSON can hold of a logged extra that it cannot."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _expects_messages(error: BaseException) -> str:
    """The way out, if a function seems to index the strings that it gets as if they were chat messages."""
    signs = {TypeError: "string indices must be integers", AttributeError: "'str' object has no attribute"}
    if not any(isinstance(error, kind) and sign in str(error) for kind, sign in signs.items()):
        return ""
    return "; it gets strings. If it reads chat messages, write chat: before its name"


def _describe(error: BaseException, path: str | None) -> str:
    """Writes an error as `ValueError: boom (my_rewards.py:12 in grade)`, with the innermost line of the user's file or
    else of any."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if frame.filename == path] or frames
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return "".join(traceback.format_exception_only(error)).strip()[:2000] + where
