"""An error as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that gets no completion. `param` names the field of the request, `code` the kind of fault.

    >>> ApiError("max_tokens=0: use 1 or more", param="max_tokens").body()
    {'error': {'message': 'max_tokens=0: use 1 or more', 'type': 'invalid_request_error', 'param': 'max_tokens',
     'code': None}}
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else None
        kind = kind or "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
