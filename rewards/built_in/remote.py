"""A reward that another service computes, over HTTP.

Request: POST, JSON `{"prompts": [...], "completions": [...], "columns": {"answer": [...]}}`.
Response: JSON `{"rewards": [1.0, null, ...]}`, one per completion.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request

from rewards.protocol import PROVIDED, Completions


def remote(
    prompts: list,
    completions: Completions,
    url: str,
    request_timeout_s: float = 3.0,
    retries: int = 2,
    backoff_s: float = 0.1,
    token_variable: str | None = None,
    **columns,
) -> list[float | None]:
    """Ask `url` for the rewards. Raises RuntimeError if it gives none.

    After a refused or broken connection, a timeout, or the statuses 429 and 5xx, the request is sent again, up to
    `retries` times, after `backoff_s`, then twice that, and so on. Every try has the same `Idempotency-Key`, a digest
    of the body, so that the server can recognise a repeat. Keep (retries + 1) * request_timeout_s below the scorer's
    timeout_s. `token_variable` names the environment variable that holds a bearer token, as no config should hold one.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url={url!r}: a remote reward is reached by http:// or https://")
    sent = {name: values for name, values in columns.items() if name not in PROVIDED}
    body = json.dumps({"prompts": prompts, "completions": completions, "columns": sent}).encode()
    headers = {"Content-Type": "application/json", "Idempotency-Key": hashlib.sha256(body).hexdigest()}
    if token_variable:
        if token_variable not in os.environ:
            raise ValueError(f"token_variable={token_variable!r} is not set in the environment")
        headers["Authorization"] = f"Bearer {os.environ[token_variable]}"
    request = urllib.request.Request(url, data=body, headers=headers)
    cause = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(backoff_s * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=request_timeout_s) as response:
                return _rewards(response.read(), url)
        except urllib.error.HTTPError as error:
            cause = f"HTTP {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:  # OSError covers URLError and timeouts
            cause = f"{type(error).__name__}: {error}"
    raise RuntimeError(f"{url} gave no rewards after {attempt + 1} tries: {cause}")


def _rewards(body: bytes, url: str) -> list[float | None]:
    try:
        return json.loads(body)["rewards"]
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f'{url} answered {body[:200]!r} instead of {{"rewards": [...]}}') from error
