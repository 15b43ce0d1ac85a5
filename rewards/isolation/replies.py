"""What a worker process answers, read with suspicion: a reward can write into the socket of its own process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MOST_BYTES = 32 << 20  # of an answer
MOST_NESTED = 100  # lists and objects inside each other in what a reward logs


class BadReply(Exception):
    """What came is no answer to the request."""


def read_reply(line: bytes | bytearray, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to `request`, which has a `number`. Raises BadReply for anything else.

    >>> read_reply(b'{"number": 3, "reward": 0.5}', {"number": 3, "given": {}})
    {'reward': 0.5}
    """
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadReply(f"{type(error).__name__} at {bytes(line[:40])!r}") from None
    if not isinstance(reply, dict) or reply.pop("number", None) != request["number"]:
        raise BadReply(f"{bytes(line[:40])!r}")
    if not (_is_failure(reply) or _fits(reply, request)):
        raise BadReply(f"an answer of another form, {bytes(line[:40])!r}")
    return reply


def _fits(reply: dict[str, Any], request: Mapping[str, Any]) -> bool:
    """The answer has the fields, the types and the lengths that the request asks for."""
    if "functions" in request:
        return isinstance(reply.get("error"), str) or _are(reply.get("signatures"), dict, len(request["functions"]))
    if "completions" in request:
        count, extras, metrics = sum(map(len, request["completions"])), reply.get("extras"), reply.get("metrics")
        return (
            _are(reply.get("rewards"), (float, dict, type(None)), count)
            and all(_is_failure(value) for value in reply["rewards"] if isinstance(value, dict))
            and isinstance(extras, dict)
            and all(_are(values, object, count) and not _nested(values) for values in extras.values())
            and isinstance(metrics, dict)
            and _are(list(metrics.values()), float, len(metrics))
        )
    if "template" in request:
        return isinstance(reply.get("text"), str)
    if not isinstance(reply.get("reward"), float | None):
        return False
    return "calls" not in request or (
        isinstance(reply.get("observation"), str | None)
        and isinstance(reply.get("done"), bool)
        and _are(reply.get("results"), list, len(request["calls"]))
        and all(list(map(type, result)) == [str, bool] for result in reply["results"])
    )


def _is_failure(value: dict[str, Any]) -> bool:
    return isinstance(value.get("kind"), str) and isinstance(value.get("message"), str)


def _are(values: object, kind: type | tuple[type, ...], count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(value, kind) for value in values)


def _nested(value: object, level: int = 0) -> bool:
    """It is nested more deeply than MOST_NESTED."""
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return level == MOST_NESTED or any(_nested(part, level + 1) for part in parts)
