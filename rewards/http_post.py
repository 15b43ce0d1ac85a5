"""A POST that is sent again where that may help: what the rewards `remote`, `judge` and `nemo_gym` have in common."""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import http.cookiejar
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rewards.isolation.cassette import Exchange, put_in

Answer = TypeVar("Answer")

MOST_BYTES = 1 << 24  # of an answer
_FAULTS: dict[str, dict[str, Any]] = {
    "rate_limited": {"status": 429, "why": put_in("rate_limited")},
    "late": {"status": 0, "why": put_in("late")},
}


class Unusable(ValueError):
    """An answer with which nothing can be done, but which may be another one next time."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *_: object) -> None:
        return None


def bearer(token_variable: str | None) -> str:
    """The key that this environment variable holds; empty without a variable. Raises ValueError if it is not set."""
    if token_variable is None:
        return ""
    if not os.environ.get(token_variable):
        raise ValueError(f"token_variable={token_variable!r} is not set in the environment")
    return os.environ[token_variable]


@dataclass(frozen=True)
class Tries:
    """How long one try may take, and how many follow it: after `backoff_s`, then twice that, and so on, or after what
    the server asks for, `longest_wait_s` at most."""

    request_timeout_s: float
    retries: int
    backoff_s: float
    longest_wait_s: float = 30.0


def post(
    url: str,
    body: bytes,
    read: Callable[[bytes], Answer],
    tries: Tries,
    *,
    token: str = "",
    before_try: Callable[[], None] = lambda: None,
    cookies: http.cookiejar.CookieJar | None = None,
) -> Answer:
    """Sends the JSON `body` and returns what `read` makes of the answer.

    The request is sent again after a refused or broken connection, a timeout, the statuses 408, 429 and 5xx, and an
    answer for which `read` raises Unusable. `Idempotency-Key` is a digest of the body, so that the server can recognise
    a repeat; after an unusable answer it is another one. `before_try` is called before each try and may raise. A
    session has `cookies`. Raises ValueError for an address that is none, and RuntimeError, without the token, if there
    is no usable answer, or if the server asks by `Retry-After` to wait for too long.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url={url!r}: it is reached by http:// or https://")
    digest = hashlib.sha256(body).hexdigest()
    headers = {"Content-Type": "application/json", "Idempotency-Key": digest}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=body, headers=headers)
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPCookieProcessor(cookies))
    exchange = Exchange("http", url, body.decode(errors="replace"))
    cause = ""
    for attempt in range(1, tries.retries + 2):
        before_try()
        wait_s = tries.backoff_s * 2 ** (attempt - 1)
        fault = exchange.fault()
        answer = _FAULTS.get(fault) or exchange.answer(partial(_send, opener, request, tries.request_timeout_s))
        status, cause = answer["status"], answer["why"]
        if status == 200:
            content = answer["body"].encode("latin-1")
            try:
                return read({"cut": content[: len(content) // 2], "twice": content * 2}.get(fault, content))
            except Unusable as error:
                cause = f"{put_in(fault)}: {error}" if fault else str(error)
                request.add_header("Idempotency-Key", f"{digest}-{attempt}")
            except (RuntimeError, ValueError) as error:
                if fault:
                    raise RuntimeError(f"{put_in(fault)}: {error}") from error
                raise
        elif status and status not in (408, 429) and status < 500:
            break
        asked = _retry_after(answer.get("retry_after"))
        if asked is not None and asked > tries.longest_wait_s:
            cause += f" (it asks to wait for {asked:g} s, more than {tries.longest_wait_s:g} s)"
            break
        wait_s = wait_s if asked is None else asked
        if attempt <= tries.retries:
            time.sleep(wait_s)
    message = f"{url} gave no usable answer after {attempt} tries: {cause}"
    raise RuntimeError(message.replace(token, "[key]") if token else message)


def _send(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout_s: float) -> dict[str, Any]:
    """The `status` of the answer, 0 where there is none, and its `body`, or `why` it cannot be used."""
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return {"status": 200, "why": "", "body": response.read(MOST_BYTES).decode("latin-1")}
    except urllib.error.HTTPError as error:
        why = f"HTTP {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
        return {"status": error.code, "why": why, "retry_after": error.headers.get("Retry-After")}
    except (OSError, http.client.HTTPException) as error:  # OSError covers URLError and timeouts
        return {"status": 0, "why": f"{type(error).__name__}: {error}"}


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait by the header `Retry-After`, which gives them or a date; None without a usable one.

    >>> _retry_after("2"), _retry_after("soon"), _retry_after(None)
    (2.0, None, None)
    """
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
