"""Columns that are inside others, as the rows of verl and NeMo-Gym have them: `reward_model.ground_truth`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def with_inner(row: Any, names: Iterable[str]) -> Any:
    """The row with a column for each of the names that is a value inside a column; what is no row stays as it is.

    >>> with_inner({"reward_model": {"ground_truth": "42"}}, ["reward_model.ground_truth"])
    {'reward_model': {'ground_truth': '42'}, 'reward_model.ground_truth': '42'}
    """
    if isinstance(row, dict):
        for name in [name for name in names if "." in name and name not in row]:
            value: Any = row
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            row = row if value is None else {**row, name: value}
    return row
