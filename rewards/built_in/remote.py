"""A reward that another service computes, over HTTP.

Request: POST, JSON `{"prompts": [...], "completions": [...], "columns": {"answer": [...]}}`.
Response: JSON `{"rewards": [1.0, null, ...]}`, one per completion.
"""

from __future__ import annotations

import json

from rewards.http_post import Tries, bearer, post
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
    """Ask `url` for the rewards, see `rewards.http_post` for what is tried again. Raises RuntimeError if it gives none.

    Keep (retries + 1) * request_timeout_s below the scorer's timeout_s. `token_variable` names the environment variable
    that holds a bearer token, as no config should hold one.
    """
    sent = {name: values for name, values in columns.items() if name not in PROVIDED}
    body = json.dumps({"prompts": prompts, "completions": completions, "columns": sent}).encode()

    def read(answer: bytes) -> list[float | None]:
        try:
            return json.loads(answer)["rewards"]
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError(f'{url} answered {answer[:200]!r} instead of {{"rewards": [...]}}') from error

    return post(url, body, read, Tries(request_timeout_s, retries, backoff_s), token=bearer(token_variable))
