"""The body of a request: JSON that becomes what a client asks for, or is refused by name."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from grpo.endpoint.api_error import ApiError
from rewards.config.json_file import parse_json, unfit

SHORT = reprlib.Repr()  # of a value that may have a million parts
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 60, 60

Kind = TypeVar("Kind", bound=BaseModel)


def read(kind: type[Kind], body: bytes) -> Kind:
    """Returns the request in a body. Raises ApiError, which names the field and what would work."""
    try:
        request = parse_json(body)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(request, dict):
        raise ApiError(f"the body is a JSON {type(request).__name__}; send an object", code="invalid_json")
    if fault := unfit(request):
        raise ApiError(f"the body {fault}", code="invalid_value")
    refuse_infinite(request)
    try:
        return kind.model_validate(request)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param, message = ".".join(map(str, first["loc"])) or None, first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise ApiError(f"{param} is missing", param=param, code="missing_required_parameter") from None
        fault = f"{param}={SHORT.repr(first['input'])}: {message}"
        raise ApiError(fault, param=param, code="invalid_value") from None


def refuse_infinite(value: object, place: str = "") -> None:
    """Raises ApiError for the first number that is not finite. JSON has none: a reply or a file could not hold it.

    >>> refuse_infinite({"a": [1, {"b": float("inf")}]})
    Traceback (most recent call last):
    grpo.endpoint.api_error.ApiError: a.1.b=inf: use a finite number
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ApiError(f"{place}={value}: use a finite number", param=place, code="invalid_value")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        if isinstance(item, float | dict | list | tuple):  # of a long prompt no number is one of these
            refuse_infinite(item, f"{place}.{key}" if place else str(key))
