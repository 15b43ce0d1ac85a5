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
from typing import TypeVar

Answer = TypeVar("Answer")

MOST_BYTES = 1 << 24  # of an answer


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
    cause = ""
    for attempt in range(1, tries.retries + 2):
        before_try()
        wait_s = tries.backoff_s * 2 ** (attempt - 1)
        try:
            with opener.open(request, timeout=tries.request_timeout_s) as response:
                return read(response.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            cause = f"HTTP {error.code} {error.reason}: {_start_of(error)}"
            if error.code not in (408, 429) and error.code < 500:
                break
            asked = _retry_after(error.headers.get("Retry-After"))
            if asked is not None and asked > tries.longest_wait_s:
                cause += f" (it asks to wait for {asked:g} s, more than {tries.longest_wait_s:g} s)"
                break
            wait_s = wait_s if asked is None else asked
        except Unusable as error:
            cause = str(error)
            request.add_header("Idempotency-Key", f"{digest}-{attempt}")
        except (OSError, http.client.HTTPException) as error:  # OSError covers URLError and timeouts
            cause = f"{type(error).__name__}: {error}"
        if attempt <= tries.retries:
            time.sleep(wait_s)
    message = f"{url} gave no usable answer after {attempt} tries: {cause}"
    raise RuntimeError(message.replace(token, "[key]") if token else message)


def _start_of(error: urllib.error.HTTPError) -> str:
    """The first words of an error answer, and none if it stalls or breaks: the status is known without them."""
    try:
        return error.read(200).decode(errors="replace")
    except (OSError, http.client.HTTPException) as fault:
        return f"({type(fault).__name__} while its text was read)"


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
