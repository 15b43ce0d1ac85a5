"""A reward that exists already, in the data or from a reward model of the run."""

from __future__ import annotations

import math

from rewards.protocol import Completions


def column(prompts: list | None, completions: Completions, name: str, **columns) -> list[float | None]:
    """The values of the column `name`, as they are; None abstains.

    Raises ValueError if there is no such column, or if a value is not a finite number.

    >>> column(None, ["so 4", "so 5"], name="helpfulness", helpfulness=[0.25, -1])
    [0.25, -1.0]
    """
    if name not in columns:
        raise ValueError(f"there is no column {name!r}; the columns are {', '.join(sorted(columns)) or 'none'}")
    return [None if value is None else _finite(name, value) for value in columns[name]]


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"column {name!r} holds {value!r}, which is not a finite number")
    return float(value)
