"""A request that is refused, whatever the API."""

from __future__ import annotations

from collections.abc import Mapping


class ApiError(Exception):
    """A request that gets no answer but this. `param` names the field of the request, `code` the kind of fault. Each
    API has a form of its own for it."""

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
